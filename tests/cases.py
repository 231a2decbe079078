"""Networks of others' kinds in small: sound ones, and faulty ones with the layers to blame."""

import math

import torch
import torchvision
from tools.calibrate import dense, kaiming, random_direction
from torch import nn
from torch.nn import functional as F

from initlab import conv_stack

R = torch.randn
he = kaiming


class Fn(nn.Module):
    def __init__(self, f, **parts):
        super().__init__()
        self.f = f
        for n, p in parts.items():
            setattr(self, n, p)

    def forward(self, *x):
        return self.f(self, *x)


SOUND = {}
FAULT = {}


def sound(f):
    SOUND[f.__name__] = f
    return f


def fault(expect):
    def deco(f):
        FAULT[f.__name__] = (f, expect)
        return f

    return deco


# ---- sound
@sound
def resnet18_zero():
    return torchvision.models.resnet18(zero_init_residual=True), R(4, 3, 64, 64)


@sound
def resnet18_224():
    n = torchvision.models.resnet18()
    nn.init.normal_(n.fc.weight, std=0.01)
    return n, R(2, 3, 224, 224)


class SE(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, c // 4, 1), nn.Conv2d(c // 4, c, 1)

    def forward(self, x):
        return x * self.b(self.a(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class SEBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c1, self.b1, self.c2, self.b2, self.se = (
            nn.Conv2d(c, c, 3, padding=1),
            nn.BatchNorm2d(c),
            nn.Conv2d(c, c, 3, padding=1),
            nn.BatchNorm2d(c),
            SE(c),
        )
        nn.init.zeros_(self.b2.weight)

    def forward(self, x):
        return (x + self.se(self.b2(self.c2(self.b1(self.c1(x)).relu())))).relu()


@sound
def se_zero():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        SEBlock(32),
        SEBlock(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    ), R(8, 3, 16, 16)


class GMLP(nn.Module):
    def __init__(self, d, n):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.fc1 = nn.Linear(d, 4 * d)
        self.gnorm = nn.LayerNorm(2 * d)
        self.proj = nn.Linear(n, n)
        self.fc2 = nn.Linear(2 * d, d)
        nn.init.normal_(self.proj.weight, std=1e-6)
        nn.init.ones_(self.proj.bias)

    def forward(self, x):
        u, v = F.gelu(self.fc1(self.norm(x))).chunk(2, -1)
        return x + self.fc2(u * self.proj(self.gnorm(v).transpose(1, 2)).transpose(1, 2))


@sound
def gmlp():
    return nn.Sequential(
        nn.Linear(24, 32), *(GMLP(32, 16) for _ in range(6)), nn.LayerNorm(32), nn.Linear(32, 10)
    ), R(8, 16, 24)


class LS(nn.Module):
    def __init__(self, d, s=1e-6, post=False):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.g = nn.Parameter(torch.full((d,), s))

    def forward(self, x):
        return x + self.g * self.b(F.gelu(self.a(self.norm(x))))


@sound
def layerscale():
    return nn.Sequential(
        nn.Linear(24, 32), *(LS(32, 1e-5) for _ in range(12)), nn.LayerNorm(32), nn.Linear(32, 10)
    ), R(8, 16, 24)


class CNX(nn.Module):
    def __init__(self, d, s=1e-6):
        super().__init__()
        self.dw = nn.Conv2d(d, d, 7, padding=3, groups=d)
        self.norm, self.a, self.b = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.g = nn.Parameter(torch.full((d,), s))
        for m in (self.dw, self.a, self.b):
            nn.init.trunc_normal_(m.weight, std=0.02)
            nn.init.zeros_(m.bias)

    def forward(self, x):
        return x + (
            self.g * self.b(F.gelu(self.a(self.norm(self.dw(x).permute(0, 2, 3, 1)))))
        ).permute(0, 3, 1, 2)


@sound
def convnext_like():
    return nn.Sequential(
        nn.Conv2d(3, 48, 4, 4),
        *(CNX(48) for _ in range(12)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(48),
        nn.Linear(48, 10),
    ), R(8, 3, 32, 32)


@sound
def small_last():
    n = kaiming(dense(4, 64))
    n[-1].weight.data.mul_(0.01)
    return n, R(32, 64)


@sound
def small_last_cnn():
    n = he(conv_stack(4, 32, classes=10))
    [m for m in n if isinstance(m, nn.Linear)][-1].weight.data.normal_(0, 0.001)
    return n, R(8, 1, 14, 14)


@sound
def ppo():
    n = dense(3, 64, nn.Tanh)
    for m in n:
        if isinstance(m, nn.Linear):
            nn.init.orthogonal_(m.weight, 2**0.5)
            nn.init.zeros_(m.bias)
    nn.init.orthogonal_(n[-1].weight, 0.01)
    return n, R(32, 64)


def two(c0, c1):
    trunk = kaiming(dense(3, 64))[:-1]
    n = Fn(
        lambda s, x: (s.a(s.t(x)), s.b(s.t(x))) if False else (lambda h: (s.a(h), s.b(h)))(s.t(x)),
        t=trunk,
        a=kaiming(dense(2, 64)),
        b=kaiming(dense(2, 64)),
    )
    return n, R(32, 64), lambda o: c0 * random_direction(o[0]) + c1 * random_direction(o[1])


@sound
def heads_a():
    return two(1, 0.01)


@sound
def heads_b():
    return two(0.01, 1)


def towers(c0, c1):
    n = Fn(lambda s, x: (s.a(x), s.b(x)), a=kaiming(dense(5, 64)), b=kaiming(dense(5, 64)))
    return n, R(32, 64), lambda o: c0 * random_direction(o[0]) + c1 * random_direction(o[1])


@sound
def towers_a():
    return towers(1, 0.01)


@sound
def towers_b():
    return towers(0.01, 1)


for px in (64, 128):
    for d in (1, 2, 3):

        def f(px=px, d=d):
            return he(conv_stack(d, 16, classes=10)), R(4, 1, px, px)

        f.__name__ = f"pool_{d}_{px}"
        sound(f)


@sound
def vgg11_32():
    return he(torchvision.models.vgg11()), R(2, 3, 32, 32)


@sound
def vgg11_128():
    return torchvision.models.vgg11(), R(2, 3, 128, 128)


@sound
def lora():
    class L(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.l = nn.Linear(d, d)
            self.A = nn.Parameter(R(4, d) / d**0.5)
            self.B = nn.Parameter(torch.zeros(d, 4))
            self.l.requires_grad_(False)

        def forward(self, x):
            return self.l(x) + x @ self.A.T @ self.B.T

    n = nn.Sequential(L(32), nn.ReLU(), L(32), nn.ReLU(), nn.Linear(32, 4))
    return n, R(16, 32)


# ---- faults
class Attn(nn.Module):
    def __init__(self, d, h=4):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.h = h
        self.norm2, self.a, self.b = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):
        y = self.norm(x)

        def f(t):
            return t.unflatten(-1, (self.h, -1)).transpose(1, 2)

        x = x + self.o(
            F.scaled_dot_product_attention(f(self.q(y)), f(self.k(y)), f(self.v(y)))
            .transpose(1, 2)
            .flatten(2)
        )
        return x + self.b(F.gelu(self.a(self.norm2(x))))


class LM(nn.Module):
    def __init__(self, d=32, V=50, L=4):
        super().__init__()
        self.e = nn.Embedding(V, d)
        self.p = nn.Parameter(R(8, d) * 0.02)
        self.blocks = nn.Sequential(*(Attn(d) for _ in range(L)))
        self.n = nn.LayerNorm(d)
        self.head = nn.Linear(d, V, bias=False)

    def forward(self, t):
        return self.head(self.n(self.blocks(self.e(t) + self.p)))


def tok(V=50):
    return torch.randint(V, (8, 8))


@sound
def lm():
    return LM(), tok()


@fault(("blocks.1.v",))
def attn_v():
    n = LM()
    n.blocks[1].v.weight.data.mul_(100)
    return n, tok()


@fault(("blocks.1.a",))
def mlp_a():
    n = LM()
    n.blocks[1].a.weight.data.mul_(100)
    return n, tok()


@fault(("blocks.1.b",))
def mlp_b():
    n = LM()
    n.blocks[1].b.weight.data.mul_(1000)
    return n, tok()


class Conv1D(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.weight = nn.Parameter(R(i, o) * 0.02)
        self.bias = nn.Parameter(torch.zeros(o))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


@fault(("blocks.1.a",))
def conv1d():
    n = LM(d=64)
    for b in n.blocks:
        b.a, b.b = Conv1D(64, 256), Conv1D(256, 64)
    n.blocks[1].a.weight.data.mul_(100)
    return n, tok()


class GCN(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.w = nn.ParameterList(nn.Parameter(R(d, d) * (2 / d) ** 0.5) for _ in range(5))
        self.register_buffer("adj", (torch.rand(32, 32) < 0.1).float() + torch.eye(32))

    def forward(self, x):
        a = self.adj / self.adj.sum(1, keepdim=True) ** 0.5 / self.adj.sum(0, keepdim=True) ** 0.5
        for w in self.w:
            x = (a @ (x @ w)).relu() if w is not self.w[-1] else a @ (x @ w)
        return x


@sound
def gcn():
    return GCN(32), R(32, 32)


for fac in (1e4, 1e-3, 0):

    def f(fac=fac):
        n = GCN(32)
        n.w[2].data.mul_(fac)
        return n, R(32, 32)

    f.__name__ = f"gcn_{fac}"
    fault(("w.2",))(f)


@fault(("w",))
def x_zeros():
    return Fn(
        lambda s, x: s.b(s.a(x).relu() @ s.w),
        a=nn.Linear(16, 16),
        w=nn.Parameter(torch.zeros(16, 16)),
        b=nn.Linear(16, 4),
    ), R(8, 16)


@fault(("2",))
def all_equal():
    n = dense(3, 32)
    n[2].weight.data.fill_(0.05)
    return n, R(16, 32)


@fault(("2",))
def rows_equal():
    n = dense(3, 32)
    n[2].weight.data[:] = n[2].weight.data[0].clone()
    return n, R(16, 32)


@fault(("0",))
def all_layers_equal():
    n = dense(3, 32)
    for m in n[::2]:
        nn.init.constant_(m.weight, 0.1)
    return n, R(16, 32)


@fault(None)
def rnn_x3():
    n = nn.RNN(32, 32, nonlinearity="relu")
    n.weight_hh_l0.data.mul_(6)
    return n, R(60, 4, 32)


@fault(None)
def lstm_forget():
    n = Fn(lambda s, x: s.h(s.l(x)[0][-1]), l=nn.LSTM(32, 32), h=nn.Linear(32, 4))
    n.l.bias_ih_l0.data[32:64] = -3
    return n, R(50, 4, 32)


@fault(None)
def lstm_100():
    n = Fn(
        lambda s, x: s.h(s.l(s.e(x))[0]),
        e=nn.Embedding(50, 32),
        l=nn.LSTM(32, 32, batch_first=True),
        h=nn.Linear(32, 50),
    )
    return n, torch.randint(50, (4, 100))


@sound
def lstm_20():
    n = Fn(
        lambda s, x: s.h(s.l(s.e(x))[0]),
        e=nn.Embedding(50, 32),
        l=nn.LSTM(32, 32, batch_first=True),
        h=nn.Linear(32, 50),
    )
    return n, torch.randint(50, (4, 20))


@sound
def lstm2_20():
    n = Fn(
        lambda s, x: s.h(s.l(s.e(x))[0]),
        e=nn.Embedding(50, 32),
        l=nn.LSTM(32, 64, 2, batch_first=True, bidirectional=True),
        h=nn.Linear(128, 50),
    )
    return n, torch.randint(50, (4, 20))


@fault(("head", "e"))
def tied():
    n = LM(d=256, V=500, L=2)
    n.head.weight = n.e.weight
    return n, tok(500)


@fault(("head",))
def head_std1():
    n = LM(d=256, V=500, L=2)
    nn.init.normal_(n.head.weight)
    return n, tok(500)


@fault(("0",))
def pixels():
    return he(conv_stack(4, 16, classes=10)), torch.randint(256, (8, 1, 14, 14)).float()


@fault(("0",))
def tiny_input():
    return kaiming(dense(4, 64)), R(32, 64) * 1e-4


@fault(None)
def u01():
    n = dense(4, 64)
    for m in n[::2]:
        nn.init.uniform_(m.weight)
    return n, R(16, 64)


@fault(("4",))
def u01_one():
    n = kaiming(dense(4, 64))
    nn.init.uniform_(n[4].weight, 0, 0.1)
    return n, R(16, 64)


@fault(None)
def bare_small():
    n = Fn(
        lambda s, x: (((x @ s.w1).relu() @ s.w2).relu() @ s.w3).relu() @ s.w4,
        **{
            f"w{i}": nn.Parameter(R(64, 64) * (2 / 64) ** 0.5 * (0.1 if i == 2 else 1))
            for i in range(1, 5)
        },
    )
    return n, R(16, 64)


@fault(None)
def cut():
    return Fn(lambda s, x: s.b(s.a(x).relu().detach()), a=nn.Linear(16, 16), b=nn.Linear(16, 4)), R(
        8, 16
    )


@fault(("0",))
def unflatten():
    n = nn.Sequential(
        nn.Linear(32, 1024), nn.Unflatten(1, (64, 4, 4)), nn.ReLU(), nn.Conv2d(64, 8, 3)
    )
    n[0].bias.data[:512] = -10
    return n, R(8, 32)


@fault(None)
def conv_12():
    n = he(conv_stack(20, 64))
    for m in n:
        if isinstance(m, nn.Conv2d):
            m.weight.data.mul_((1.2 / 2) ** 0.5)
    return n, R(8, 1, 14, 14)


@fault(None)
def conv_4():
    n = he(conv_stack(20, 64))
    for m in n:
        if isinstance(m, nn.Conv2d):
            m.weight.data.mul_(2**0.5)
    return n, R(8, 1, 14, 14)


class U(nn.Module):
    def __init__(self, c=16, L=4):
        super().__init__()
        self.inp = nn.Conv2d(1, c, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(c * 2**i, c * 2 ** (i + 1), 3, 2, 1) for i in range(L))
        self.d2 = nn.ModuleList(
            nn.Conv2d(c * 2 ** (i + 1), c * 2 ** (i + 1), 3, 1, 1) for i in range(L)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(c * 2 ** (i + 1), c * 2**i, 2, 2) for i in range(L)
        )
        self.u2 = nn.ModuleList(nn.Conv2d(c * 2 ** (i + 1), c * 2**i, 3, 1, 1) for i in range(L))
        self.out = nn.Conv2d(c, 1, 1)

    def forward(self, x):
        h = self.inp(x).relu()
        keep = []
        for d, e in zip(self.down, self.d2, strict=False):
            keep.append(h)
            h = e(d(h).relu()).relu()
        for i in reversed(range(len(self.up))):
            h = self.u2[i](torch.cat([keep[i], self.up[i](h).relu()], 1)).relu()
        return self.out(h)


@fault(None)
def unet_default():
    return U(), R(4, 1, 32, 32)


@sound
def unet_he():
    return he(U()), R(4, 1, 32, 32)


@fault(None)
def nan_():
    n = dense(3, 32)
    n[2].weight.data[1, 1] = math.nan
    return n, R(8, 32)


@fault(("lA", "lB"))
def lora00():
    return Fn(
        lambda s, x: s.h((s.l(x) + x @ s.lA @ s.lB).relu()),
        l=nn.Linear(32, 32),
        lA=nn.Parameter(torch.zeros(32, 4)),
        lB=nn.Parameter(torch.zeros(4, 32)),
        h=nn.Linear(32, 3),
    ), R(8, 32)


@fault(None)
def keras372():
    n = dense(4, 128)
    for m in n[::2]:
        b = 1 / 128**0.5
        nn.init.uniform_(m.weight, -b * (1 / 3) ** 0.5, b * (1 / 3) ** 0.5)
        nn.init.zeros_(m.bias)
    return n, R(32, 128)


@fault(("e",))
def embed100():
    n = Fn(
        lambda s, t: s.h(s.n(s.a(s.e(t)).relu())),
        e=nn.Embedding(50, 32),
        a=nn.Linear(32, 32),
        n=nn.LayerNorm(32),
        h=nn.Linear(32, 4),
    )
    n.e.weight.data.mul_(100)
    return n, tok()


@fault(None)
def vgg19_worse():
    n = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["E"])
    for m in n:
        if isinstance(m, nn.Conv2d):  # as VGG draws them, and half as large
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(m.bias)
            m.weight.data.mul_(0.5)
    return n.append(nn.Flatten()).append(nn.Linear(512, 10)), R(2, 3, 32, 32)


class PostNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.a, self.b = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.n = nn.LayerNorm(d)

    def forward(self, x):
        return self.n(x + self.b(self.a(x).relu()))


@sound
def small_embedding_before_norms():
    n = nn.Sequential(nn.Embedding(50, 32), PostNorm(32), PostNorm(32), nn.Linear(32, 50))
    nn.init.normal_(n[0].weight, std=0.02)
    return n, tok()


@fault(("0",))
def small_embedding_without_norms():
    n = nn.Sequential(nn.Embedding(50, 64), *kaiming(dense(2, 64)))
    nn.init.normal_(n[0].weight, std=0.02)
    return n, tok()


class Scaled(LM):
    def forward(self, t):
        return self.head(self.n(self.blocks(self.e(t) + self.p)) * self.n.weight.numel() ** -0.5)


@sound
def tied_and_scaled():
    n = Scaled(d=256, V=500, L=2)
    n.head.weight = n.e.weight
    return n, tok(500)


@fault(("head",))
def scaled_and_100_times_that():
    n = Scaled(d=256, V=500, L=2)
    nn.init.normal_(n.head.weight, std=100)
    return n, tok(500)


class Gated(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm = nn.RMSNorm(d)
        self.gate, self.up, self.down = (
            nn.Linear(d, 2 * d),
            nn.Linear(d, 2 * d),
            nn.Linear(2 * d, d),
        )
        for m in (self.gate, self.up, self.down):
            nn.init.normal_(m.weight, std=0.02)
            nn.init.zeros_(m.bias)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def gated():
    return nn.Sequential(nn.Linear(24, 128), *(Gated(128) for _ in range(4)), nn.Linear(128, 9))


@sound
def gated_002():
    return gated(), R(8, 16, 24)


@fault(("3.up",))
def gated_up():
    n = gated()
    n[3].up.weight.data.mul_(0.01)
    return n, R(8, 16, 24)


@fault(("1",))
def zero_norm_without_a_shortcut():
    n = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Linear(16, 4))
    nn.init.zeros_(n[1].weight)
    return n, R(8, 16)


@fault(("2",))
def softmax_over_one_value():
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1), nn.Softmax(1)), R(8, 16)


@sound
def one_dead_feature_beside_others():
    n = nn.ModuleDict({"a": nn.Linear(16, 1), "b": nn.Linear(16, 16), "c": nn.Linear(16, 4)})
    n["a"].bias.data.fill_(-10)
    return Fn(lambda s, x: s.n["c"](s.n["b"](x).relu() + s.n["a"](x).relu()), n=n), R(8, 16)


@fault(("0",))
def few_features_all_dead():
    n = nn.Sequential(nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 2))
    n[0].bias.data.fill_(-10)
    return n, R(8, 16)
