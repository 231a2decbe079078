"""`trace` against forward and backward passes written out by hand."""

import copy
import math
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

from initlab.tracing import TRACED, LayerTrace, Trace, trace


class Block(nn.Module):
    """Residual, with one in-place activation used twice, and a tuple as output."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        h = self.act(self.conv(x))
        h = self.act(x + self.conv(h))
        return h, {"logits": self.head(h.mean((2, 3)))}


class Raises(nn.Module):
    def forward(self, x):
        raise RuntimeError("boom")


@pytest.fixture
def x():
    return torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def target():
    return torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture
def block():
    torch.manual_seed(1)
    return Block()


def block_loss(output, target):
    return functional.cross_entropy(output[1]["logits"], target)


def rms(v):
    return v.double().square().mean().sqrt().item()


def block_by_hand(block, x, target):
    z1 = block.conv(x)
    a1 = z1.relu()
    z2 = block.conv(a1)
    a2 = (x + z2).relu()
    logits = block.head(a2.mean((2, 3)))
    value = functional.cross_entropy(logits, target)
    outputs = [z1, a1, z2, a2, logits]
    weights = [block.conv.weight, None, block.conv.weight, None, block.head.weight]
    grads = torch.autograd.grad(value, [*outputs, block.conv.weight, block.head.weight])
    of_weight = dict(zip((block.conv.weight, block.head.weight), grads[5:], strict=True))
    return outputs, grads[:5], [None if w is None else rms(of_weight[w]) for w in weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residual_reused_inplace_tuple(block, x, target, dtype):
    block, x = block.to(dtype), x.to(dtype)
    outputs, grads, weight_grads = block_by_hand(block, x, target)
    entries = trace(block, x, target, block_loss)

    assert [e.name for e in entries] == ["conv", "act", "conv#2", "act#2", "head"]
    assert [e.kind for e in entries] == ["Conv2d", "ReLU", "Conv2d", "ReLU", "Linear"]
    for entry, y, grad, weight_grad in zip(entries, outputs, grads, weight_grads, strict=True):
        y = y.detach()
        assert entry.shape == tuple(y.shape)
        assert entry.mean == pytest.approx(y.mean().item(), rel=1e-4, abs=1e-6)
        assert entry.std == pytest.approx(y.std().item(), rel=1e-5)
        assert entry.rms == pytest.approx(rms(y), rel=1e-5)
        assert entry.signal == pytest.approx(y.var(0).mean().sqrt().item(), rel=1e-5)
        assert entry.grad_rms == pytest.approx(rms(grad), rel=1e-5)
        if weight_grad is None:
            assert entry.weight_grad_rms is None
        else:
            assert entry.weight_grad_rms == pytest.approx(weight_grad, rel=1e-5)
        assert all(type(v) is float for v in (entry.mean, entry.std, entry.rms, entry.signal))


def test_without_loss_the_same_forward_numbers_and_no_gradients(block, x, target):
    plain, full = trace(block, x), trace(block, x, target, block_loss)
    assert [(e.mean, e.std, e.rms, e.signal) for e in plain] == [
        (e.mean, e.std, e.rms, e.signal) for e in full
    ]
    assert all(e.grad_rms is None and e.weight_grad_rms is None for e in plain)


def test_signal_is_zero_when_the_inputs_are_alike_while_std_is_not():
    entry = trace(nn.Conv2d(1, 4, 3), torch.arange(25.0).reshape(1, 1, 5, 5).repeat(3, 1, 1, 1))[0]
    assert entry.signal == 0
    assert entry.std > 1


def test_sums_in_float64():
    layer = nn.Linear(1, 1).requires_grad_(False)
    layer.weight.fill_(1)
    layer.bias.fill_(0)
    y = torch.tensor([[1e25], [-1e25]])  # whose squares overflow float32
    assert trace(layer, y)[0].rms == pytest.approx(1e25)


def test_one_input_has_no_signal_and_warns_of_nothing(block, x):
    entries = trace(block, x[:1])
    assert all(math.isnan(e.signal) for e in entries)
    assert entries[0].std == pytest.approx(block.conv(x[:1]).std().item())
    assert math.isnan(trace(nn.Linear(2, 1), torch.ones(1, 2))[0].std)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(2, 3, 3), (2, 2, 8)),
        (nn.Conv3d(2, 3, 3), (2, 2, 4, 4, 4)),
        (nn.ConvTranspose1d(2, 3, 3), (2, 2, 8)),
        (nn.ConvTranspose2d(2, 3, 3), (2, 2, 4, 4)),
        (nn.ConvTranspose3d(2, 3, 3), (2, 2, 4, 4, 4)),
        (nn.LeakyReLU(0.1), (2, 8)),
        (nn.GELU(), (2, 8)),
        (nn.Tanh(), (2, 8)),
        (nn.GLU(), (2, 8)),
        (nn.Threshold(0.1, 20), (2, 8)),
    ],
)
def test_kinds(layer, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (entry,) = trace(layer, x)
    y = layer(x).detach()
    assert (entry.name, entry.kind) == (type(layer).__name__,) * 2
    assert entry.shape == tuple(y.shape)
    assert entry.rms == pytest.approx(rms(y))


def test_other_modules_are_not_traced():
    assert nn.MultiheadAttention not in TRACED
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Dropout(), nn.Identity())
    assert [e.name for e in trace(model, torch.randn(4, 3))] == ["1"]


def test_prelu_weight_and_tied_weight():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, nn.PReLU(), second)
    x = torch.randn(4, 3)
    total, slope = torch.autograd.grad(model(x).square().sum(), [first.weight, model[1].weight])
    entries = trace(model, x, loss=lambda out: out.square().sum())
    expected = [rms(total), rms(slope), rms(total)]
    assert [e.weight_grad_rms for e in entries] == pytest.approx(expected)


def test_frozen_parameters_still_give_the_gradient_of_the_output(block, x, target):
    expected = trace(block, x, target, block_loss)
    block.requires_grad_(False)
    entries = trace(block, x, target, block_loss)
    assert [e.grad_rms for e in entries] == pytest.approx([e.grad_rms for e in expected])
    assert [e.weight_grad_rms for e in entries] == [None] * 5
    assert not any(p.requires_grad for p in block.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_where_the_caller_turned_them_off(block, x, target, mode):
    expected = trace(block, x, target, block_loss)
    with mode():
        assert trace(block, x + 0, target, block_loss) == expected
        assert not torch.is_grad_enabled()


def test_unused_output_has_no_gradient():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x):
            return self.used(x), self.unused(x)

    used, unused = trace(TwoHeads(), torch.ones(3, 2), loss=lambda out: out[0].sum())
    assert (used.grad_rms, used.weight_grad_rms) == (1, 3)
    assert (unused.grad_rms, unused.weight_grad_rms) == (None, None)


def test_the_loss_may_run_the_model_again_unseen(x, block, target):
    def loss(output, target):
        block(x)
        return block_loss(output, target)

    assert trace(block, x, target, loss) == trace(block, x, target, block_loss)


def stateful():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.ReLU(inplace=True),
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def broken_loss(output, target):
    raise RuntimeError("boom")


def broken_hook(module, args, output):
    raise RuntimeError("boom")


@pytest.mark.parametrize("where", ["nowhere", "forward", "loss", "hook", "not a scalar"])
def test_leaves_everything_as_it_was(x, target, where):
    model = stateful()
    if where == "forward":
        model.append(Raises())
    model[0].eval()
    model[1].bias.requires_grad_(False)
    model[1].weight.grad = torch.ones_like(model[1].weight)
    x.requires_grad_()
    calls = []
    model[1].register_forward_hook(lambda *args: calls.append(1))
    if where == "hook":
        model[5].register_forward_hook(broken_hook)
    loss = {"loss": broken_loss, "not a scalar": lambda out, target: out}.get(
        where, functional.cross_entropy
    )
    before, x_before = copy.deepcopy(model.state_dict()), x.detach().clone()
    identities = [id(t) for t in (*model.parameters(), *model.buffers())]
    hooks = [list(m._forward_hooks) for m in model.modules()]
    random_state = torch.get_rng_state()

    if where == "nowhere":
        first = trace(model, x, target, loss)
        assert first == trace(model, x, target, loss)  # the same dropout mask, too
    elif where == "not a scalar":
        with pytest.raises(ValueError, match=r"scalar tensor, got shape \(6, 3\)"):
            trace(model, x, target, loss)
    else:
        with pytest.raises(RuntimeError, match="boom"):
            trace(model, x, target, loss)

    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert after["2.num_batches_tracked"] == 0
    assert identities == [id(t) for t in (*model.parameters(), *model.buffers())]
    assert hooks == [list(m._forward_hooks) for m in model.modules()]
    assert torch.equal(random_state, torch.get_rng_state())
    assert [m.training for m in model] == [False] + [True] * (len(model) - 1)
    assert [p.requires_grad for p in model.parameters()] == [True, False] + [True] * 4
    assert torch.equal(model[1].weight.grad, torch.ones_like(model[1].weight))
    assert model[5].weight.grad is None
    assert x.grad is None
    assert torch.equal(x, x_before)
    assert len(calls) == (2 if where == "nowhere" else 1)
    assert torch.is_grad_enabled()


def test_runs_in_the_mode_the_model_is_in(x):
    model = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU())
    x = 5 + 2 * x
    in_training, in_evaluation = trace(model, x)[0], trace(model.eval(), x)[0]
    assert in_training.rms < 1
    assert in_evaluation.rms > 4


def test_keeps_no_activation_without_a_loss():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)))
    outputs, alive = [], []

    def watch(module, args, output):
        outputs.append(weakref.ref(output))
        alive.append(sum(ref() is not None for ref in outputs))

    for layer in model:
        layer.register_forward_hook(watch)
    trace(model, torch.ones(2, 2))
    assert max(alive) <= 2
    assert len(alive) == 6


def test_errors(block, x, target):
    with pytest.raises(ValueError, match="target given without a loss"):
        trace(block, x, target)
    with pytest.raises(ValueError, match="nothing to trace"):
        trace(nn.Sequential(nn.BatchNorm2d(2), nn.Flatten()), x)
    with pytest.raises(ValueError, match="scalar tensor, got float"):
        trace(block, x, target, lambda out, target: 1.0)
    with pytest.raises(ValueError, match="does not depend"):
        trace(block, x, target, lambda out, target: torch.tensor(1.0))
    with pytest.raises(ValueError, match="x is empty"):
        trace(block, x[:0])


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_stay_lazy():
    model = nn.Sequential(nn.LazyConv2d(2, 3), nn.ReLU())
    with pytest.raises(ValueError, match="without a shape"):
        trace(model, torch.ones(1, 1, 5, 5))
    assert nn.parameter.is_lazy(model[0].weight)


def test_table():
    entries = Trace(
        [
            LayerTrace("0", "Conv2d", (2, 3, 4, 4), -1.23456e-5, 0.5, 123.4, math.nan),
            LayerTrace("1.act", "ReLU", (2, 3), 0.0, 1234.5, 1.0, 0.03512),
        ]
    )
    assert str(entries) == repr(entries)
    assert repr(entries).splitlines() == [
        "name   kind    shape              mean        std        rms     signal",
        "0      Conv2d  (2, 3, 4, 4)  -1.23e-05      0.500        123        nan",
        "1.act  ReLU    (2, 3)             0.00   1.23e+03       1.00     0.0351",
    ]


def test_table_shows_gradients_where_there_are_any():
    entries = Trace([LayerTrace("0", "ReLU", (2,), 0.0, 0.0, 0.0, 0.0, grad_rms=0.25)])
    header, row = repr(entries).splitlines()
    assert header.split()[-2:] == ["grad_rms", "weight_grad_rms"]
    assert row.split()[-2:] == ["0.250", "-"]
    assert len(header) == len(row)
