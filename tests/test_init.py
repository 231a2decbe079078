"""`gain`, `fans` and `initialize_` against `torch.nn.init` itself, bit for bit."""

import copy
import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from initlab import fans, gain, initialize_
from initlab.init import Scheme

SCHEMES = get_args(Scheme)
LAYERS = {
    "Linear": lambda **kw: nn.Linear(7, 5, **kw),
    "Conv1d": lambda **kw: nn.Conv1d(4, 6, 3, **kw),
    "Conv2d": lambda **kw: nn.Conv2d(3, 8, (5, 3), **kw),
    "Conv3d": lambda **kw: nn.Conv3d(2, 3, 2, **kw),
    "grouped": lambda **kw: nn.Conv2d(4, 6, 3, groups=2, **kw),
    "depthwise": lambda **kw: nn.Conv1d(3, 6, 3, groups=3, **kw),
    "ConvTranspose1d": lambda **kw: nn.ConvTranspose1d(4, 3, 3, **kw),
    "ConvTranspose2d": lambda **kw: nn.ConvTranspose2d(4, 6, 3, groups=2, **kw),
    "ConvTranspose3d": lambda **kw: nn.ConvTranspose3d(2, 3, 2, **kw),
}
slope_for = {s: {"a": 0.3} if s.startswith("kaiming") else {} for s in SCHEMES}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
lazy = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def torch_draws(shape, scheme, a, mode, g, dtype=torch.float32):
    """Draw with `torch.nn.init` on a fresh tensor."""
    w = torch.empty(shape, dtype=dtype)
    leaky = {"a": a, "mode": mode, "nonlinearity": "leaky_relu", "generator": g}
    match scheme:
        case "default":  # as the reset_parameters of all these layers
            return nn.init.kaiming_uniform_(w, a=math.sqrt(5), generator=g)
        case "kaiming_normal":
            return nn.init.kaiming_normal_(w, **leaky)
        case "kaiming_uniform":
            return nn.init.kaiming_uniform_(w, **leaky)
        case "xavier_normal":
            return nn.init.xavier_normal_(w, generator=g)
        case "xavier_uniform":
            return nn.init.xavier_uniform_(w, generator=g)
        case "orthogonal":
            return nn.init.orthogonal_(w, generator=g)


def snapshot(module):
    parts = [*module.named_parameters(), *module.named_buffers()]
    unreal = [v for _, v in parts if nn.parameter.is_lazy(v) or v.is_meta]
    return {k: v.detach().clone() for k, v in parts if all(v is not u for u in unreal)}


def assert_same(module, before):
    after = snapshot(module)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


@pytest.mark.parametrize("a", [0.0, 0.01, 0.25, 1.0, math.sqrt(5), -0.5, 30.0])
def test_gain_is_that_of_torch(a):
    assert gain(a) == nn.init.calculate_gain("leaky_relu", a)


@pytest.mark.parametrize("a", [math.nan, math.inf, -math.inf])
def test_gain_refuses(a):
    with pytest.raises(ValueError, match=f"must be finite, got {a}"):
        gain(a)


def upper(t):
    """Return P(z > t)."""
    return math.erfc(t / math.sqrt(2)) / 2


def density(t):
    return math.exp(-t * t / 2) / math.sqrt(2 * math.pi)


def elu_square(alpha):
    """Return E elu(z)^2, by E[e^(kz); z < 0] = e^(k^2 / 2) P(z > k)."""
    return 0.5 + alpha**2 * (math.exp(2) * upper(2) - 2 * math.exp(0.5) * upper(1) + 0.5)


RELU6 = 0.5 - upper(6) - 6 * density(6) + 36 * upper(6)


@pytest.mark.parametrize(
    ("activation", "square"),
    [
        (F.relu, 0.5),
        (nn.ReLU(inplace=True), 0.5),
        (nn.LeakyReLU(0.3), (1 + 0.3**2) / 2),
        (nn.PReLU(init=0.25), (1 + 0.25**2) / 2),
        (nn.Identity(), 1.0),
        (torch.exp, math.exp(2)),
        (torch.sin, (1 - math.exp(-2)) / 2),
        (lambda z: z**3, 15.0),
        (lambda z: 1e-100 * z, 1e-200),
        (nn.ELU(), elu_square(1.0)),
        (nn.ELU(0.4), elu_square(0.4)),
        (nn.SELU(), 1.0),
        # Kinks
        (F.relu6, RELU6),
        (nn.ReLU6(), RELU6),
        (nn.Hardtanh(-0.7, 0.7), 1 - 2 * (0.7 * density(0.7) + 0.51 * upper(0.7))),
        # Jumps
        (nn.Hardshrink(0.5), 2 * (0.5 * density(0.5) + upper(0.5))),
        (nn.Threshold(0.1, 20.0), 0.1 * density(0.1) + upper(0.1) + 400 * upper(-0.1)),
        (lambda z: (z > 4.321).double(), upper(4.321)),
    ],
)
def test_gain_of_an_activation_in_closed_form(activation, square):
    assert gain(activation) == pytest.approx(1 / math.sqrt(square), rel=1e-9)


@pytest.mark.parametrize(
    "activation", [F.gelu, F.silu, F.mish, F.hardswish, F.softplus, torch.tanh, torch.sigmoid]
)
def test_gain_of_an_activation_by_the_trapezoidal_rule(activation):
    z = torch.arange(-40.0, 40.0, 2**-14, dtype=torch.float64)
    square = (activation(z) ** 2 * (-z * z / 2).exp()).sum() * 2**-14 / math.sqrt(2 * math.pi)
    assert gain(activation) == pytest.approx(1 / math.sqrt(square), rel=1e-8)


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (torch.zeros_like, "is 0 or not finite: it has no gain"),
        (lambda z: z * math.nan, "is 0 or not finite"),
        (lambda z: (z * z).exp(), "is 0 or not finite"),
        (lambda z: (z * z / 4).exp(), "is 0 or not finite"),
        (lambda z: 1 / z, "is 0 or not finite"),
        (nn.Softmax(0), "is not elementwise"),
        (nn.GLU(), "is not elementwise"),
        (nn.Dropout(), "is random"),
    ],
)
def test_gain_refuses_an_activation(activation, message):
    with pytest.raises(ValueError, match=message):
        gain(activation)
    layer = nn.Linear(3, 4)
    before = snapshot(layer)
    with pytest.raises(ValueError, match=message):
        initialize_(layer, "kaiming_normal", a=activation)
    assert_same(layer, before)


def test_gain_leaves_a_module_alone():
    module = nn.PReLU()
    gain(module)
    assert module.weight.dtype == torch.float32
    assert module.weight.grad is None


@every_layer
@pytest.mark.parametrize("scheme", ["kaiming_normal", "kaiming_uniform"])
@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
def test_weights_for_an_activation(make, scheme, mode):
    layer = initialize_(make(), scheme, a=F.gelu, mode=mode, generator=generator())
    relu = torch_draws(layer.weight.shape, scheme, 0.0, mode, generator())
    expected = relu * (gain(F.gelu) / math.sqrt(2))
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-6, atol=0)


@every_scheme
def test_an_int_seeds_a_new_generator(scheme):
    layers = [nn.Conv2d(3, 8, 3) for _ in range(2)]
    state = torch.get_rng_state()
    for layer, g in zip(layers, (3, generator(3)), strict=True):
        initialize_(layer, scheme, bias="default", generator=g)
    assert_same(layers[0], snapshot(layers[1]))
    assert torch.equal(torch.get_rng_state(), state)


@every_layer
def test_fans_are_those_of_torch(make):
    weight = make().weight
    assert fans(weight) == nn.init._calculate_fan_in_and_fan_out(weight)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_fans_refuse(shape):
    with pytest.raises(ValueError, match=r"2 or more dimensions, got \("):
        fans(torch.zeros(shape))


@every_layer
@every_scheme
@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
def test_weights_are_those_of_torch(make, scheme, mode):
    layer = make()
    initialize_(layer, scheme, mode=mode, generator=generator(), **slope_for[scheme])
    expected = torch_draws(layer.weight.shape, scheme, 0.3, mode, generator())
    assert torch.equal(layer.weight, expected)


@every_layer
@pytest.mark.parametrize("scheme", ["xavier_normal", "xavier_uniform", "orthogonal"])
def test_gain_is_an_argument_of_torch(make, scheme):
    layer = initialize_(make(), scheme, generator=generator(), gain=math.sqrt(2))
    expected = torch.empty(layer.weight.shape)
    getattr(nn.init, scheme + "_")(expected, gain=math.sqrt(2), generator=generator())
    assert torch.equal(layer.weight, expected)


def test_bfloat16():
    layer = nn.Conv2d(3, 8, 5, dtype=torch.bfloat16)
    initialize_(layer, "kaiming_normal", generator=generator())
    expected = torch_draws(
        (8, 3, 5, 5), "kaiming_normal", 0.0, "fan_in", generator(), torch.bfloat16
    )
    assert torch.equal(layer.weight, expected)


def test_a_default_device_changes_nothing():
    expected = initialize_(nn.Linear(3, 4), "kaiming_normal", a=F.gelu, generator=0)
    layer = nn.Linear(3, 4)
    with torch.device("meta"):
        initialize_(layer, "kaiming_normal", a=F.gelu, generator=0)
    assert torch.equal(layer.weight, expected.weight)


def test_what_is_kept_of_an_attention():
    attention = nn.MultiheadAttention(8, 2)
    before = snapshot(attention)
    initialize_(attention, "kaiming_normal", bias="default", generator=generator())
    changed = {k for k, v in attention.named_parameters() if not torch.equal(v, before[k])}
    assert changed == {"out_proj.weight", "out_proj.bias"}


def test_a_is_a_relu_and_mode_fan_in_by_default():
    layer = initialize_(nn.Conv2d(3, 8, 5), "kaiming_normal", generator=generator())
    expected = torch_draws((8, 3, 5, 5), "kaiming_normal", 0.0, "fan_in", generator())
    assert torch.equal(layer.weight, expected)


@every_scheme
def test_float64(scheme):
    layer = nn.Conv2d(3, 8, 5, dtype=torch.float64)
    initialize_(layer, scheme, generator=generator(), **slope_for[scheme])
    expected = torch_draws((8, 3, 5, 5), scheme, 0.3, "fan_in", generator(), torch.float64)
    assert torch.equal(layer.weight, expected)


@every_scheme
def test_channels_last_draws_as_contiguous(scheme):
    layer = nn.Conv2d(3, 8, 5).to(memory_format=torch.channels_last)
    initialize_(layer, scheme, generator=generator(), **slope_for[scheme])
    assert torch.equal(layer.weight, torch_draws((8, 3, 5, 5), scheme, 0.3, "fan_in", generator()))
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)


@every_layer
def test_default_is_reset_parameters(make):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        fresh = make()
        other = copy.deepcopy(fresh)
        nn.init.zeros_(other.weight)
        nn.init.zeros_(other.bias)
        torch.manual_seed(3)
        initialize_(other, "default", bias="default")
    assert_same(other, snapshot(fresh))


def test_default_is_reset_parameters_of_a_network():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        fresh = nn.Sequential(
            nn.Conv2d(1, 4, 5),
            nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 3, bias=False), nn.Flatten()),
            nn.Linear(8, 3),
        )
        torch.manual_seed(4)
        other = copy.deepcopy(fresh)
        initialize_(other, "orthogonal", bias="zeros")
        torch.manual_seed(3)
        initialize_(other, "default", bias="default")
    assert_same(other, snapshot(fresh))


def test_network_is_drawn_in_order_with_one_generator():
    net = nn.ModuleDict({"first": nn.Linear(3, 4), "second": nn.ModuleList([nn.Conv1d(2, 3, 2)])})
    initialize_(net, "xavier_normal", bias="default", generator=generator(5))
    g = generator(5)
    for layer in (net["first"], net["second"][0]):
        bound = 1 / math.sqrt(layer.weight[0].numel())
        weight = torch_draws(layer.weight.shape, "xavier_normal", 0, "fan_in", g)
        bias = nn.init.uniform_(torch.empty(layer.bias.shape), -bound, bound, generator=g)
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.bias, bias)


@every_scheme
def test_in_place_and_the_same_object(scheme):
    net = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 3)), nn.Linear(3, 4))
    net[1].weight.requires_grad_(False)
    before = snapshot(net)
    pointers = [p.data_ptr() for p in net.parameters()]
    parameters = list(net.parameters())
    assert initialize_(net, scheme, bias="default", generator=generator(8)) is net
    assert all(p is q for p, q in zip(net.parameters(), parameters, strict=True))
    assert [p.data_ptr() for p in net.parameters()] == pointers
    assert [p.requires_grad for p in net.parameters()] == [True, True, False, True]
    assert all(p.grad_fn is None and p.grad is None for p in net.parameters())
    assert not any(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_bias():
    layer = nn.Conv2d(2, 4, 3)
    kept = layer.bias.detach().clone()
    initialize_(layer, "kaiming_normal", generator=generator())
    assert torch.equal(layer.bias, kept)
    initialize_(layer, "kaiming_normal", bias="zeros", generator=generator())
    assert torch.equal(layer.bias, torch.zeros(4))
    initialize_(layer, "kaiming_normal", bias="default", generator=generator())
    g = generator()
    torch_draws((4, 2, 3, 3), "kaiming_normal", 0.0, "fan_in", g)
    bound = 1 / math.sqrt(18)
    assert torch.equal(layer.bias, torch.empty(4).uniform_(-bound, bound, generator=g))


@pytest.mark.parametrize("bias", ["keep", "zeros", "default"])
def test_layer_without_a_bias(bias):
    layer = initialize_(nn.Linear(3, 4, bias=False), "default", bias=bias, generator=generator())
    assert torch.equal(layer.weight, torch_draws((4, 3), "default", 0, "fan_in", generator()))
    assert layer.bias is None


@every_scheme
def test_global_rng_untouched_with_a_generator(scheme):
    layer = nn.Conv2d(3, 8, 3)
    state = torch.get_rng_state()
    initialize_(layer, scheme, bias="default", generator=generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_other_layers_kept():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Embedding(3, 4), nn.PReLU())
    with torch.no_grad():
        for p in net[1:].parameters():
            p.normal_(generator=generator())
    before, first = snapshot(net[1:]), snapshot(net[0])
    initialize_(net, "kaiming_uniform", bias="default", generator=generator())
    assert_same(net[1:], before)
    assert not torch.equal(net[0].weight, first["weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "he"}, "unknown scheme 'he'; known are default, kaiming_normal"),
        ({"mode": "fan_avg"}, "unknown mode 'fan_avg'; known are fan_in, fan_out"),
        ({"bias": "ones"}, "unknown bias 'ones'; known are keep, zeros, default"),
        ({"scheme": "kaiming_normal", "a": math.nan}, "must be finite, got nan"),
        ({"scheme": "kaiming_uniform", "a": math.inf}, "must be finite, got inf"),
        ({"a": 0.0}, "'default' assumes no slope: leave out a = 0.0"),
        ({"scheme": "xavier_uniform", "a": 0.0}, "'xavier_uniform' assumes no slope"),
        ({"scheme": "orthogonal", "a": 1.0}, "'orthogonal' assumes no slope"),
        ({"gain": 1.0}, "'default' has its own gain: leave out gain = 1.0"),
        ({"scheme": "kaiming_normal", "gain": 2.0}, "'kaiming_normal' has its own gain"),
        ({"scheme": "orthogonal", "gain": 0.0}, "must be positive and finite, got 0.0"),
        ({"scheme": "xavier_normal", "gain": math.nan}, "must be positive and finite, got nan"),
    ],
)
def test_wrong_options_change_nothing(options, message):
    net = nn.Sequential(nn.Linear(2, 3), nn.Conv2d(1, 2, 3))
    before, g = snapshot(net), generator()
    state = g.get_state()
    with pytest.raises(ValueError, match=message):
        initialize_(net, **{"scheme": "default", "bias": "zeros", "generator": g} | options)
    assert_same(net, before)
    assert torch.equal(g.get_state(), state)


@pytest.mark.parametrize("make", [nn.ReLU, nn.Sequential, lambda: nn.BatchNorm2d(3)])
def test_nothing_to_initialise(make):
    module = make()
    with pytest.raises(ValueError, match=f"{type(module).__name__} holds no Linear or conv"):
        initialize_(module, "default")


@lazy
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.LazyConv2d(2, 3), "LazyConv2d.* no shape before its first input"),
        (lambda: nn.LazyLinear(2), "LazyLinear.* no shape before its first input"),
        (lambda: parametrizations.weight_norm(nn.Linear(3, 4)), "computed"),
        (lambda: parametrizations.orthogonal(nn.Linear(3, 4)), "computed"),
        (lambda: parametrizations.spectral_norm(nn.Conv2d(1, 2, 3)), "computed"),
        (lambda: spectral_norm(nn.Conv2d(1, 2, 3)), "computed"),
        (lambda: nn.Linear(3, 4, device="meta"), "on the meta device"),
    ],
)
def test_impossible_layers_change_nothing(make, message):
    net = nn.Sequential(nn.Linear(2, 3), make())
    before, g = snapshot(net), generator()
    state = g.get_state()
    with pytest.raises(ValueError, match=message):
        initialize_(net, "kaiming_normal", bias="zeros", generator=g)
    assert_same(net, before)
    assert torch.equal(g.get_state(), state)


def test_orthogonal_needs_single_precision():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4).half())
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"needs float32 or float64, got torch\.float16"):
        initialize_(net, "orthogonal")
    assert_same(net, before)
