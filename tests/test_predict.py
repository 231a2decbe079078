"""`predict` and `draw` against each other, against torch's own layers, and against enumeration.

Enumeration knows nothing of patches: a layer is linear in its weights, so that passing each weight
alone through the layer gives all that the closed formulas speak of.
"""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from initlab import draw, gain, initialize_, load_mnist, predict
from initlab import layer as module

LAYERS = {
    "5x5": (lambda **kw: nn.Conv2d(1, 6, 5, **kw), (3, 1, 9, 8)),
    "strided": (lambda **kw: nn.Conv2d(3, 4, 3, stride=2, padding=2, **kw), (2, 3, 7, 6)),
    "uneven": (lambda **kw: nn.Conv2d(2, 3, (2, 3), (1, 2), (0, 1), **kw), (2, 2, 5, 8)),
    "grouped": (lambda **kw: nn.Conv2d(4, 6, 3, groups=2, **kw), (2, 4, 6, 6)),
    "depthwise": (lambda **kw: nn.Conv2d(3, 6, 3, groups=3, padding=1, **kw), (2, 3, 5, 5)),
    "1x1": (lambda **kw: nn.Conv2d(5, 3, 1, **kw), (2, 5, 3, 4)),
    "7x7": (lambda **kw: nn.Conv2d(2, 3, 7, padding=3, **kw), (2, 2, 7, 7)),
    "dilated": (lambda **kw: nn.Conv2d(2, 3, 3, dilation=2, **kw), (2, 2, 8, 7)),
    "same": (lambda **kw: nn.Conv2d(2, 3, (4, 3), padding="same", **kw), (2, 2, 6, 5)),
    "no bias": (lambda **kw: nn.Conv2d(1, 4, 3, bias=False, **kw), (3, 1, 6, 6)),
    "Linear": (lambda **kw: nn.Linear(6, 4, **kw), (9, 6)),
}
every_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
every_type = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
SLOPES = (0.0, 0.3, 1.0, 1.5)

# That torch's own padding="same" copies the picture is no concern of the comparison
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def correlated(shape, dtype=torch.float64):
    """Return neighbours that are alike, in channels of different means."""
    x = torch.randn(shape, dtype=torch.float64, generator=generator())
    x = x + 0.8 * x.roll(1, -1) + torch.linspace(-0.5, 1, shape[1]).view(-1, *[1] * len(shape[2:]))
    return x.to(dtype)


def responses(x, layer):
    """Return what each weight adds to the outputs of its filter: (groups, fan_in, outputs)."""
    groups, n = getattr(layer, "groups", 1), layer.weight[0].numel()
    ones = torch.eye(n, dtype=torch.float64)
    if isinstance(layer, nn.Linear):
        y = functional.linear(x.double(), ones)
    else:
        ones = ones.view(n, *layer.weight.shape[1:]).repeat(groups, 1, 1, 1)
        options = layer.stride, layer.padding, layer.dilation, groups
        y = functional.conv2d(x.double(), ones, None, *options)
    return y.transpose(0, 1).reshape(groups, n, -1)


def weight_std(layer, scheme, a):
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(layer.weight)
    if scheme.startswith("xavier"):
        return math.sqrt(2 / (fan_in + fan_out))
    a = math.sqrt(5) if scheme == "default" else a
    return nn.init.calculate_gain("leaky_relu", a) / math.sqrt(fan_in)


def bias_bound(layer, bias):
    has_one = layer.bias is not None and bias == "default"
    return 1 / math.sqrt(layer.weight[0].numel()) if has_one else 0.0


def close(value, rel):
    return pytest.approx(float(value), rel=rel, abs=0)


# Draws ------------------------------------------------------------------------------------------


@every_layer
@every_type
@pytest.mark.parametrize(
    ("scheme", "bias"), [("kaiming_normal", "default"), ("orthogonal", "zeros"), ("default",) * 2]
)
def test_draws_are_those_of_initialize_(make, shape, dtype, scheme, bias):
    x, layer = correlated(shape, dtype), make(dtype=dtype)
    drawn = draw(x, layer, scheme, a=0.5, bias=bias, n=3, generator=generator(7))
    g = generator(7)
    # Sums of a few hundred terms: some tens of roundings
    off = 100 * torch.finfo(dtype).eps
    for i in range(3):
        initialize_(layer, scheme, a=0.5, bias=bias, generator=g)
        with torch.no_grad():
            out = layer(x)
        assert drawn.count == out.numel()
        for slope in SLOPES:
            y = functional.leaky_relu(out, slope).double()
            each, rms = drawn.each(slope), y.square().mean().sqrt().item()
            # A mean and a std are differences of numbers as large as the rms
            assert each.mean[i].item() == pytest.approx(y.mean().item(), rel=0, abs=off * rms)
            assert each.std[i].item() == pytest.approx(y.std().item(), rel=0, abs=off * rms)
            assert each.rms[i].item() == close(rms, off)


def test_drawn_moments():
    drawn = draw(correlated((2, 1, 5, 5)), nn.Conv2d(1, 2, 3), "default", n=4, generator=0)
    assert drawn.halves.shape == (4, 4)
    assert drawn.halves.dtype == torch.float64
    moments, each = drawn.at(0.3), drawn.each(0.3)
    assert moments.n == 4
    assert all(type(value) is float for value in moments[:6])
    for name in ("mean", "std", "rms"):
        assert getattr(each, name).shape == (4,)
        assert getattr(moments, name + "_sd") == getattr(each, name).std().item()
    assert moments.mean == close(each.mean.mean(), 1e-14)
    assert moments.std**2 == close(each.std.square().mean(), 1e-14)
    assert moments.rms**2 == close(each.rms.square().mean(), 1e-14)
    assert drawn.at() == drawn.at(1.0)
    assert all(torch.equal(*pair) for pair in zip(drawn.each(), drawn.each(1.0), strict=True))


def test_one_draw_has_no_sd():
    moments = draw(correlated((2, 3)), nn.Linear(3, 2), "default", n=1).at(0.0)
    assert moments.n == 1
    assert all(math.isnan(sd) for sd in moments[3:6])


def test_one_output_has_no_variance():
    layer = nn.Linear(3, 1)
    assert draw(torch.ones(1, 3), layer, "default", n=2).each().std.tolist() == [0.0, 0.0]
    assert predict(torch.ones(1, 3), layer, "default").at().std == 0.0


def test_draw_leaves_the_layer_and_the_data_alone():
    x, layer = correlated((2, 1, 6, 6), torch.float32), nn.Conv2d(1, 3, 3, padding=1)
    kept = [t.detach().clone() for t in (x, layer.weight, layer.bias)]
    draw(x, layer, "kaiming_normal", n=3)
    predict(x, layer, "kaiming_normal")
    assert all(torch.equal(*pair) for pair in zip(kept, (x, layer.weight, layer.bias), strict=True))
    assert layer.padding == (1, 1)


def test_no_graph():
    x, layer = correlated((2, 1, 6, 6)).requires_grad_(), nn.Conv2d(1, 3, 3, padding=1)
    assert not draw(x, layer, "default", n=2).halves.requires_grad
    predicted = predict(x, layer, "default")
    assert not predicted.halves.requires_grad
    assert not predicted.covariance.requires_grad


@pytest.mark.parametrize("scheme", ["default", "kaiming_normal", "orthogonal"])
def test_draws_are_reproducible(scheme):
    x, layer = correlated((2, 1, 6, 6)), nn.Conv2d(1, 3, 3)
    state = torch.get_rng_state()
    first, again, other = (
        draw(x, layer, scheme, n=5, generator=generator(seed)).halves for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).any()
    assert len(first.unique(dim=0)) == 5


def test_global_rng_is_the_default():
    x, layer = correlated((2, 1, 6, 6)), nn.Conv2d(1, 3, 3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        halves = draw(x, layer, "default", n=2).halves
    for g in (generator(3), 3):  # an int is the seed of a new generator
        assert torch.equal(halves, draw(x, layer, "default", n=2, generator=g).halves)


@pytest.mark.parametrize("block", [1, 100, 200, 4000, 2**19])
@pytest.mark.parametrize("groups", [1, 2])
def test_draws_in_blocks(monkeypatch, block, groups):
    x, layer = correlated((5, 2, 6, 5)), nn.Conv2d(2, 4, 3, groups=groups)  # 48 outputs a picture
    expected = [draw(x, layer, "default", n=1, generator=g).halves for g in [generator(1)] * 70]
    sizes, bmm = [], torch.bmm

    def measured(*args, out):
        sizes.append(out.numel())
        return bmm(*args, out=out)

    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(torch, "bmm", measured)
    halves = draw(x, layer, "default", n=70, generator=generator(1)).halves
    assert max(sizes) <= max(block, 4)
    assert sum(sizes) == 70 * 240
    torch.testing.assert_close(halves, torch.cat(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("lit", [slice(0, 0), slice(1, 4), slice(0, 4)])
def test_patches_that_repeat_the_first_count_as_often_as_they_occur(groups, lit):
    x, layer = torch.zeros(4, 2, 9, 8).double(), nn.Conv2d(2, 4, 3, groups=groups).double()
    x[lit, :, 3:6, 2:5] = torch.randn(x[lit, :, 3:6, 2:5].shape, generator=generator()).double()
    halves, g = draw(x, layer, "default", n=5, generator=generator(1)).halves, generator(1)
    for found in halves:
        with torch.no_grad():
            y = initialize_(layer, "default", bias="default", generator=g)(x)
        parts = y.clamp_min(0), y.clamp_max(0)
        expected = [part.mean() for part in parts] + [part.square().mean() for part in parts]
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=0)


# Predictions, exact -----------------------------------------------------------------------------


@every_layer
@every_type
@pytest.mark.parametrize(
    ("scheme", "bias"),
    [
        ("default", "default"),
        ("kaiming_normal", "zeros"),
        ("kaiming_uniform", "default"),
        ("xavier_normal", "default"),
        ("xavier_uniform", "zeros"),
    ],
)
def test_prediction_from_responses(make, shape, dtype, scheme, bias):
    x, layer = correlated(shape, dtype), make()
    R = responses(x, layer)
    V, B = weight_std(layer, scheme, 0.5) ** 2, bias_bound(layer, bias)
    U = B**2 / 3
    M, mu2 = R @ R.mT / R.shape[2], R.mean(2).square().sum(1)
    power = V * sum(m.trace() for m in M) / len(M) + U
    size = (V * R.square().sum(1) + U).sqrt().mean()  # E|y| is sqrt(2 / pi) of it
    out_channels = len(layer.weight)
    mean_var = (V * mu2 + U).mean() / out_channels
    fourth = 0.0 if "normal" in scheme else -6 / 5  # excess kurtosis
    square_var = 2 * (M @ M).diagonal(0, 1, 2).sum(1) + fourth * (M.diagonal(0, 1, 2) ** 2).sum(1)
    square_var = (V**2 * square_var + 4 * U * V * mu2).mean() + B**4 / 5 - U**2
    square_var = square_var / out_channels

    predicted = predict(x, layer, scheme, a=0.5, bias=bias)
    n = R.shape[2] * out_channels
    assert predicted.count == n
    assert predicted.at() == predicted.at(1.0)
    y = predicted.at(1.0)
    assert y.mean == pytest.approx(0, abs=1e-15 * math.sqrt(power))
    assert y.rms == close(power.sqrt(), 1e-10)
    assert y.std == close((n / (n - 1) * (power - mean_var)).sqrt(), 1e-10)
    assert y.mean_sd == close(mean_var.sqrt(), 1e-10)
    assert y.rms_sd == close(square_var.sqrt() / (2 * power.sqrt()), 1e-10)
    # The mean is 0, so that the variance moves with the mean square alone, to a factor n / (n - 1)
    assert y.std_sd == close(square_var.sqrt() / (2 * y.std), 1.01 / (n - 1))
    for slope in SLOPES:
        moments = predicted.at(slope)
        assert moments.rms**2 == close((1 + slope**2) / 2 * power, 1e-10)
        mean = (1 - slope) * size / math.sqrt(2 * math.pi)
        assert moments.mean == pytest.approx(mean.item(), rel=1e-10, abs=1e-15)
        spread = n / (n - 1) * (moments.rms**2 - mean**2 - moments.mean_sd**2)
        assert moments.std == close(spread.sqrt(), 1e-10)


@pytest.mark.parametrize("scheme", ["kaiming_normal", "kaiming_uniform"])
@pytest.mark.parametrize("bias", ["default", "zeros"])
@pytest.mark.parametrize(
    "make", [lambda c, g: nn.Conv2d(2 * g, c, (1, 2), groups=g), lambda c, g: nn.Linear(4, c)]
)
@pytest.mark.parametrize("groups", [1, 2])
def test_prediction_from_all_weights_of_a_quadrature(scheme, bias, make, groups):
    # Three points of Gauss-Hermite or Gauss-Legendre a weight integrate polynomials up to degree 5,
    # and the mean square, squared, is one of degree 4. The layer itself does the rest.
    layer = make(3 * groups, groups)
    n = layer.weight[0].numel()
    x = correlated((5, 4) if isinstance(layer, nn.Linear) else (2, 2 * groups, 2, 4))
    std, B = weight_std(layer, scheme, 0.5), bias_bound(layer, bias)
    point, outer = (3, 1 / 6) if scheme == "kaiming_normal" else (9 / 5, 5 / 18)
    node = math.sqrt(point) * std
    at = torch.tensor([-node, 0.0, node], dtype=torch.float64)
    p = torch.tensor([outer, 1 - 2 * outer, outer], dtype=torch.float64)
    at_bias = B * math.sqrt(3 / 5) * torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    p_bias = torch.tensor([5, 8, 5], dtype=torch.float64) / 18
    nodes = torch.cartesian_prod(*[at] * n, at_bias)
    weights = torch.cartesian_prod(*[p] * n, p_bias).prod(1)

    mean_var, square_var, squares = 0, 0, dict.fromkeys(SLOPES, 0)
    for part in x.chunk(getattr(layer, "groups", 1), dim=1):  # one group at a time
        options = {"bias": True, "dtype": torch.float64}
        if isinstance(layer, nn.Linear):
            all_of_them = nn.Linear(4, len(nodes), **options)
        else:
            all_of_them = nn.Conv2d(2, len(nodes), (1, 2), **options)
        with torch.no_grad():
            all_of_them.weight.copy_(nodes[:, :-1].reshape(all_of_them.weight.shape))
            all_of_them.bias.copy_(nodes[:, -1])
            y = all_of_them(part).transpose(0, 1).flatten(1)
        means, mean_squares = y.mean(1), y.square().mean(1)
        square = weights @ mean_squares
        mean_var += weights @ means**2 / layer.weight.shape[0]
        square_var += weights @ (mean_squares - square) ** 2 / layer.weight.shape[0]
        for slope in SLOPES:
            squares[slope] += weights @ functional.leaky_relu(y, slope).square().mean(1)

    parts = getattr(layer, "groups", 1)
    predicted = predict(x, layer, scheme, a=0.5, bias=bias)
    for slope in SLOPES:
        assert predicted.at(slope).rms ** 2 == close(squares[slope] / parts, 1e-10)
    moments = predicted.at(1.0)
    assert moments.mean_sd == close(math.sqrt(mean_var / parts), 1e-10)
    assert 2 * moments.rms * moments.rms_sd == close(math.sqrt(square_var / parts), 1e-10)


@pytest.mark.parametrize("n_in", [1, 2])
def test_covariance_from_all_directions(n_in, monkeypatch):
    monkeypatch.setattr(module, "UNIFORM", 0.0)  # the bias too is Gaussian here
    # Two Gaussian numbers, two weights or a weight and a bias, are a direction and an independent
    # length L. Half-moments are proportional to L, or to L^2, of E[L^k] = 2^(k/2) gamma(1 + k/2).
    # The rule of equal steps h is off by h^2 / 12 times the jumps of the slope, about 1e-9 here.
    x = correlated((7, n_in))
    layer = nn.Linear(n_in, 3, bias=n_in == 1)
    angle = torch.arange(2**16, dtype=torch.float64) * (2 * math.pi / 2**16)
    V, U = weight_std(layer, "kaiming_normal", 0.5) ** 2, bias_bound(layer, "default") ** 2 / 3
    first, second = math.sqrt(V) * angle.cos(), math.sqrt(U if n_in == 1 else V) * angle.sin()
    y = x[:, :1] * first + (second if n_in == 1 else x[:, 1:] * second)
    halves = torch.stack([y.clamp_min(0), y.clamp_max(0)])
    halves = torch.cat([halves, halves**2]).mean(1)  # (4, directions)
    k = torch.arange(5, dtype=torch.float64)
    length = 2 ** (k / 2) * (1 + k / 2).lgamma().exp()
    degree = torch.tensor([1, 1, 2, 2])
    E = halves.mean(1) * length[degree]
    products = halves @ halves.T / len(angle) * length[degree[:, None] + degree]
    covariance = products - E[:, None] * E

    predicted = predict(x, layer, "kaiming_normal", a=0.5)
    torch.testing.assert_close(predicted.halves, E, rtol=1e-8, atol=0)
    torch.testing.assert_close(predicted.covariance, covariance / 3, rtol=1e-8, atol=0)


def test_covariance_of_groups_is_their_mean():
    x, whole = correlated((2, 4, 5, 5)), nn.Conv2d(4, 6, 3, groups=2)
    halves = [predict(part, nn.Conv2d(2, 3, 3), "default") for part in x.chunk(2, dim=1)]
    both = predict(x, whole, "default")
    expected = (halves[0].covariance + halves[1].covariance) / 4  # of twice as many filters
    torch.testing.assert_close(both.covariance, expected, rtol=1e-10, atol=0)
    assert not torch.allclose(halves[0].covariance, halves[1].covariance, rtol=0.01, atol=0)


def pair_parts(predicted):
    """Return what is computed from pairs: of |y|, of y|y|, of |y| with y^2 and of y with y|y|."""
    t = torch.tensor([[1, 1, 0, 0], [1, -1, 0, 0], [0, 0, 1, 1], [0, 0, 1, -1]]).double()
    c = t @ predicted.covariance @ t.T
    return torch.stack([c[1, 1], c[3, 3], c[1, 2], c[0, 3]])


def test_many_blocks():
    # 21,125 patches of 441 numbers, in blocks of at most 2^22: 3 of them or more
    x, layer = correlated((5, 1, 85, 85)), nn.Conv2d(1, 3, 21)
    predicted, R = predict(x, layer, "kaiming_normal"), responses(x, layer)[0]
    V, U = weight_std(layer, "kaiming_normal", 0.0) ** 2, bias_bound(layer, "default") ** 2 / 3
    size = R.square().sum(0)
    assert predicted.at(1.0).rms ** 2 == close(V * size.mean() + U, 1e-10)
    assert predicted.at(1.0).mean_sd == close(
        ((V * R.mean(1).square().sum() + U) / 3).sqrt(), 1e-10
    )
    mean = (V * size + U).sqrt().mean() / math.sqrt(2 * math.pi)
    assert predicted.at(0.0).mean == close(mean, 1e-10)


def test_a_sample_of_the_patches_stands_for_all(monkeypatch):
    x, layer = correlated((9, 1, 18, 18)), nn.Conv2d(1, 3, 5)  # 1,764 patches
    x[0] *= 10  # one picture has almost all of the energy
    sampled = pair_parts(predict(x, layer, "kaiming_normal"))
    monkeypatch.setattr(module, "PAIRS_FROM", 1764)
    of_all = pair_parts(predict(x, layer, "kaiming_normal"))
    torch.testing.assert_close(sampled, of_all, rtol=0.05, atol=0)
    assert not torch.isclose(sampled, of_all, rtol=1e-9).any()


def test_a_sample_counts_each_patch_with_itself_as_often_as_all_do(monkeypatch):
    # Orthogonal patches: only with itself does a patch covary, in 1 of 1,600 pairs
    x, layer = torch.eye(1600), nn.Linear(1600, 1, bias=False)
    sampled = predict(x, layer, "kaiming_normal").covariance
    monkeypatch.setattr(module, "PAIRS_FROM", 1600)
    of_all = predict(x, layer, "kaiming_normal").covariance
    torch.testing.assert_close(sampled, of_all, rtol=1e-10, atol=1e-16)


def test_a_sample_is_scaled_to_the_energy_of_all():
    p = correlated((3, 8))
    square_var = 2 * (p.T @ p + 0.1).square().mean().item()
    plain = module._pair_covariance(p, 8, 1.0, 0.1, -1.2, -0.012, square_var)
    told = module._pair_covariance(p, 8, 1.0, 0.1, -1.2, -0.012, 16 * square_var)
    # twice every y
    same = module._pair_covariance(2 * p, 8, 1.0, 0.4, -1.2, -0.192, 16 * square_var)
    torch.testing.assert_close(told, same, rtol=1e-10, atol=0)
    assert (told[plain != 0] / plain[plain != 0]).log2().round().unique().tolist() == [2, 3, 4]


def test_values_of_the_layer_do_not_matter():
    x, layer = correlated((2, 1, 6, 6)), nn.Conv2d(1, 3, 3)
    before = predict(x, layer, "default").covariance
    nn.init.constant_(layer.weight, math.nan)
    assert torch.equal(predict(x, layer, "default").covariance, before)


def test_black_pictures():
    x, layer = torch.zeros(2, 1, 5, 5), nn.Conv2d(1, 3, 3)
    for slope in SLOPES:
        nothing = predict(x, layer, "default", bias="zeros").at(slope)
        assert nothing[:6] == (0.0,) * 6
        assert nothing.covers(draw(x, layer, "default", bias="zeros", n=2).at(slope))
    assert not draw(x, layer, "default", bias="zeros", n=2).halves.any()
    y = predict(x, layer, "default").at(1.0)  # the bias alone, U(-1/3, 1/3)
    assert y.rms == close(1 / math.sqrt(27), 1e-10)
    assert y.mean_sd == close(1 / 9, 1e-10)


# Predictions against draws ----------------------------------------------------------------------


def standard_error_of_sd(values):
    """Return that of `values.std()`: sd / sqrt(2 n) if they are Gaussian, else by the kurtosis."""
    z = (values - values.mean()) / values.std()
    return values.std() * ((z**4).mean() - 1).sqrt() / (2 * math.sqrt(len(values)))


@pytest.mark.parametrize(
    ("scheme", "bias"),
    [
        ("kaiming_normal", "zeros"),
        ("kaiming_normal", "default"),
        ("xavier_normal", "zeros"),
        ("kaiming_uniform", "zeros"),
        ("xavier_uniform", "default"),
        ("default", "default"),
    ],
)
def test_prediction_of_draws(scheme, bias):
    n = 4000
    x, layer = correlated((2, 2, 4, 5)), nn.Conv2d(2, 48, 3, groups=2)
    drawn = draw(x, layer, scheme, a=0.5, bias=bias, n=n, generator=generator(1))
    predicted = predict(x, layer, scheme, a=0.5, bias=bias)

    # Where w and b are not Gaussian, E|y| differs by this part of it, at most, to first order: the
    # excess kurtosis of y over 24, by the Edgeworth series
    p, V = responses(x, layer), weight_std(layer, scheme, 0.5) ** 2
    U = bias_bound(layer, bias) ** 2 / 3
    uniform = 0.0 if "normal" in scheme else (V**2 * p**4).sum(1)
    excess = 6 / 5 * (uniform + U**2) / (V * p.square().sum(1) + U) ** 2
    part = (excess / 24).max().item()

    for slope in (0.0, 1.0):
        seen, told = drawn.each(slope), predicted.at(slope)
        ses = {k: getattr(seen, k).square().std() / math.sqrt(n) for k in ("std", "rms")}
        mean_se = seen.mean.std() / math.sqrt(n)
        off = part * abs(told.mean)
        assert told.covers(drawn.at(slope))
        assert abs(seen.mean.mean() - told.mean) <= 5 * mean_se + off
        assert abs(seen.rms.square().mean() - told.rms**2) <= 5 * ses["rms"]
        off_std = 2 * abs(told.mean) * off
        assert abs(seen.std.square().mean() - told.std**2) <= 5 * ses["std"] + off_std
        # The sd's hold the leading term of the excess kurtosis; others are of its size times r
        missed = 4 * part if slope == 0.0 else 0.0
        for name in ("mean", "std", "rms"):
            values, sd = getattr(seen, name), getattr(told, name + "_sd")
            # sd(r) = sd(r^2) / (2 r) leaves out terms of the relative order of the variance of r^2
            first_order = 0 if name == "mean" else (2 * sd / getattr(told, name)) ** 2
            assert first_order < 0.05
            allowed = 5 * standard_error_of_sd(values) + (first_order + missed) * sd
            assert abs(values.std() - sd) <= allowed, (slope, name)
        squares_sd = 2 * told.rms * told.rms_sd
        squares = seen.rms.square()
        allowed = 5 * standard_error_of_sd(squares) + missed * squares_sd
        assert abs(squares.std() - squares_sd) <= allowed, slope


def test_how_low_the_mean_is_with_uniform_weights():
    p = functional.unfold(load_mnist().x_valid[:100], 5).transpose(1, 2).flatten(0, 1)[::97]
    layer = nn.Linear(25, 20_000)
    initialize_(layer, "kaiming_uniform", generator=generator())
    with torch.no_grad():
        y = layer(p).double()
    told, means, squares = predict(p, layer, "kaiming_uniform").at(0.0), y.abs().mean(0), y.square()
    # Without most of the luck: of the mean squares, whose expected value is exact, it is known
    squares = squares.mean(0)
    slope = torch.stack([means, squares]).cov()[0, 1] / squares.var()
    means = means - slope * (squares - 2 * told.rms**2)
    low, error = (value / (2 * told.mean) for value in (means.mean(), means.std() / 20_000**0.5))
    assert abs(low - 1.005) < 0.001 + 3 * error
    assert error < 0.001
    # One weight and no bias: E|w| is half the bound
    assert math.sqrt(3) / 2 / math.sqrt(2 / math.pi) == pytest.approx(1.085, abs=0.001)


@pytest.mark.parametrize("slope", [0.0, 0.5])
@pytest.mark.parametrize("scheme", ["default", "kaiming_normal"])
def test_sds_on_white_noise(scheme, slope):
    # Inputs that are not alike leave most to the fourth moment of the weights, whose mean square
    # varies by 2 - 6/5 of its size instead of 2
    n, x, layer = 3000, torch.randn(500, 25, generator=generator()), nn.Linear(25, 64, bias=False)
    drawn = draw(x, layer, scheme, n=n, generator=generator(1)).at(slope)
    told = predict(x, layer, scheme).at(slope)
    for name in ("mean_sd", "std_sd", "rms_sd"):
        ratio = getattr(told, name) / getattr(drawn, name)
        assert abs(ratio - 1) < 5 / math.sqrt(2 * n) + 0.03, name


def test_padding_that_was_changed_in_place():
    x, layer = torch.randn(2, 3, 12, 12, generator=generator()), nn.Conv2d(3, 8, 3, padding=1)
    layer.dilation = layer.padding = (2, 2)
    assert predict(x, layer, "default").count == draw(x, layer, "default", n=1).count
    assert predict(x, layer, "default").count == layer(x).numel()


def test_parametrised_layers_are_not_run():
    layer = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    predict(PICTURE, layer, "default")
    draw(PICTURE, layer, "default", n=1)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("scheme", ["kaiming_normal", "kaiming_uniform", "xavier_normal"])
def test_an_activation_for_a(scheme):
    x, layer = correlated((2, 2, 6, 6)), nn.Conv2d(2, 4, 3, groups=2)
    told, by_activation = (predict(x, layer, scheme, a=a).at() for a in (0.3, nn.LeakyReLU(0.3)))
    assert told.rms == close(by_activation.rms, 1e-9)
    factor = gain(functional.gelu) ** 2 if scheme.startswith("kaiming") else 1.0
    bias_free = [
        draw(x, layer, scheme, a=a, n=2, generator=0, bias="zeros").halves
        for a in (1.0, functional.gelu)
    ]
    torch.testing.assert_close(bias_free[1][:, 2:], factor * bias_free[0][:, 2:], rtol=1e-6, atol=0)


@pytest.mark.parametrize("slope", [math.nan, math.inf, -math.inf])
def test_slope_must_be_finite(slope):
    x, layer = torch.ones(2, 3), nn.Linear(3, 2)
    for moments in (predict(x, layer, "default"), draw(x, layer, "default", n=2)):
        with pytest.raises(
            ValueError, match=f"slope of the activation must be finite, got {slope}"
        ):
            moments.at(slope)


@pytest.mark.parametrize("factor", [0.5, 1.3])
def test_scaled_weights(factor):
    x, layer = correlated((2, 1, 6, 6)), nn.Conv2d(1, 3, 3, bias=False)
    a = math.sqrt(2 / factor**2 - 1)  # of a gain that is `factor` times that of a = 1
    for f in (predict, lambda *args: draw(*args, n=4, generator=0)):
        plain, scaled = f(x, layer, "kaiming_uniform", 1.0), f(x, layer, "kaiming_uniform", a)
        assert plain.scaled(factor).count == plain.count
        assert plain.scaled(factor).at(0.3)[6:] == plain.at(0.3)[6:]
        for told, seen in zip(plain.scaled(factor).at(0.3)[:6], scaled.at(0.3)[:6], strict=True):
            # The weights drawn are of float32
            torch.testing.assert_close(told, seen, rtol=1e-6, atol=1e-6 * scaled.at(0.3).rms_sd)


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_factor_must_be_positive(factor):
    x, layer = torch.ones(2, 3), nn.Linear(3, 2)
    for moments in (predict(x, layer, "default"), draw(x, layer, "default", n=2)):
        with pytest.raises(ValueError, match=f"positive and finite, got {factor}"):
            moments.scaled(factor)


# Errors -----------------------------------------------------------------------------------------

PICTURE = torch.ones(2, 3, 6, 6)
NAN, INF = (PICTURE.where(torch.eye(6) == 0, bad) for bad in (math.nan, math.inf))


def both(*args, **kwargs):
    """Return the two functions with the arguments, for an error that both must raise."""
    return [lambda f=f: f(*args, **kwargs) for f in (predict, draw)]


@pytest.mark.parametrize(
    ("x", "conv", "options", "message"),
    [
        (PICTURE, nn.Conv2d(2, 4, 3), {}, r"shape \(N, 2, H, W\).* got \(2, 3, 6, 6\)"),
        (PICTURE, nn.Conv2d(6, 4, 3, groups=2), {}, r"shape \(N, 6, H, W\).* got \(2, 3, 6, 6\)"),
        (PICTURE[0], nn.Conv2d(3, 4, 3), {}, r"shape \(N, 3, H, W\).* got \(3, 6, 6\)"),
        (PICTURE, nn.Linear(3, 4), {}, r"shape \(N, 3\).* got \(2, 3, 6, 6\)"),
        (torch.ones(2, 4), nn.Linear(3, 4), {}, r"shape \(N, 3\).* got \(2, 4\)"),
        (PICTURE[:0], nn.Conv2d(3, 4, 3), {}, r"not be empty, got \(0, 3, 6, 6\)"),
        (PICTURE[..., :0], nn.Conv2d(3, 4, 3), {}, r"not be empty, got \(2, 3, 6, 0\)"),
        (PICTURE, nn.Conv2d(3, 4, (3, 7)), {}, r"kernel \(3, 7\) is larger than .* \(6, 6\)"),
        (PICTURE, nn.Conv2d(3, 4, 3, dilation=3), {}, r"kernel \(3, 3\) is larger"),
        (PICTURE, nn.Conv2d(3, 4, 9, padding=1), {}, r"\(9, 9\) is larger .* \(8, 8\)"),
        (NAN, nn.Conv2d(3, 4, 3), {}, "nan or infinite"),
        (INF, nn.Conv2d(3, 4, 3), {}, "nan or infinite"),
        (PICTURE, nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), {}, "got 'reflect'"),
        (PICTURE, nn.LazyConv2d(4, 3), {}, "no shape before its first input"),
        (PICTURE, nn.Conv2d(3, 4, 3), {"scheme": "he"}, "scheme 'he'; known are default"),
        (PICTURE, nn.Conv2d(3, 4, 3), {"bias": "keep"}, "bias 'keep'; known are default, zeros"),
        (PICTURE, nn.Conv2d(3, 4, 3), {"a": math.nan}, "must be finite, got nan"),
        (PICTURE, nn.Conv2d(3, 4, 3), {"scheme": "xavier_normal", "a": math.inf}, "got inf"),
    ],
)
def test_value_errors(x, conv, options, message):
    for call in both(x, conv, **{"scheme": "default"} | options):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("x", "conv", "message"),
    [
        (torch.ones(2, 3, 6), nn.Conv1d(3, 4, 3), "needs a Conv2d or a Linear, got Conv1d"),
        (PICTURE, nn.ConvTranspose2d(3, 4, 3), "got ConvTranspose2d"),
        (PICTURE, nn.Sequential(nn.Conv2d(3, 4, 3)), "got Sequential"),
        (PICTURE, None, "got NoneType"),
        (PICTURE.long(), nn.Conv2d(3, 4, 3), "floating-point tensor, got torch.int64"),
        (PICTURE.bool(), nn.Conv2d(3, 4, 3), "floating-point tensor, got torch.bool"),
        (PICTURE.numpy(), nn.Conv2d(3, 4, 3), "floating-point tensor, got float32"),
    ],
)
def test_type_errors(x, conv, message):
    for call in both(x, conv, "default"):
        with pytest.raises(TypeError, match=message):
            call()


@pytest.mark.parametrize("n", [0, -1])
def test_number_of_draws(n):
    with pytest.raises(ValueError, match=f"n must be 1 or more, got {n}"):
        draw(PICTURE, nn.Conv2d(3, 4, 3), "default", n=n)


def test_orthogonal_is_not_predicted():
    with pytest.raises(ValueError, match="no prediction for scheme 'orthogonal'; known are def"):
        predict(PICTURE, nn.Conv2d(3, 4, 3), "orthogonal")


def test_orthogonal_needs_more_than_half_precision():
    with pytest.raises(ValueError, match="needs float32 or float64, got torch"):
        draw(PICTURE, nn.Conv2d(3, 4, 3).half(), "orthogonal", n=1)


def test_picture_as_large_as_the_kernel():
    for call in both(PICTURE, nn.Conv2d(3, 4, (6, 4), dilation=(1, 1)), "default"):
        assert call().count == 2 * 4 * 1 * 3


# Memory -----------------------------------------------------------------------------------------

MEMORY = """
import warnings
import torch
from torch import nn
from initlab import draw, predict

warnings.simplefilter("error")

def mib(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key)) / 1024

x, layer = torch.rand(1, 1, 28, 28), nn.Conv2d(1, 8, 5)  # 18 KiB of outputs a draw
draw(x, layer, "default", n=100)
few = mib("VmHWM")
draw(x, layer, "default", n=10_000)
print(mib("VmHWM") - few)

x, layer = torch.rand(10_000, 1, 28, 28), nn.Conv2d(1, 8, 7, stride=2)  # 452 MiB of patches
before = mib("VmRSS")
predict(x, layer, "default")
print(mib("VmHWM") - before)
"""


def test_memory():
    # Read from /proc, where a fresh process starts at its own size: its ru_maxrss would start at
    # that of the one that started it
    try:
        with open("/proc/self/status") as f:
            known = "VmHWM" in f.read()
    except OSError:
        known = False
    if not known:
        pytest.skip("needs the peak memory in /proc/self/status, as Linux has it")
    command = [sys.executable, "-c", MEMORY]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    drawing, predicting = map(float, done.stdout.split())
    assert drawing < 50  # MiB
    assert predicting < 500  # about 250, most of it for the pairs of patches


@pytest.mark.parametrize("size", [224, 512])
def test_large_pictures_in_float32(size):
    x, layer = torch.randn(1, 1, size, size, generator=generator()), nn.Conv2d(1, 64, 3)
    single, double = (
        draw(t, layer, "default", n=1, generator=generator()).halves for t in (x, x.double())
    )
    torch.testing.assert_close(single, double, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype):
    x, layer = torch.randn(1, 1, 64, 64, generator=generator()).to(dtype), nn.Conv2d(1, 64, 3)
    half, double = (
        draw(20 * t, layer, "default", n=1, generator=generator()).halves for t in (x, x.double())
    )
    torch.testing.assert_close(half, double, rtol=1e-2, atol=0)
    predict(x, layer, "default")


def test_pairs_do_not_grow_with_the_groups(monkeypatch):
    sizes, pair_covariance = [], module._pair_covariance

    def measured(p, *args):
        sizes.append(p.shape[1] ** 2)
        return pair_covariance(p, *args)

    monkeypatch.setattr(module, "_pair_covariance", measured)
    for groups in (1, 16):
        layer = nn.Conv2d(16, 16, 3, groups=groups)
        predict(torch.rand(4, 16, 28, 28, generator=generator()), layer, "default")
    assert len(sizes) == 17
    assert sum(sizes[1:]) < 1.1 * sizes[0]


@pytest.mark.parametrize("n", [800, 1000])  # the golden ratio picks some patches twice here
def test_no_patch_is_sampled_twice(n, monkeypatch):
    x, layer = torch.eye(n), nn.Linear(n, 1, bias=False)
    sampled = predict(x, layer, "kaiming_normal").covariance
    monkeypatch.setattr(module, "PAIRS_FROM", n)
    torch.testing.assert_close(
        sampled, predict(x, layer, "kaiming_normal").covariance, rtol=1e-10, atol=1e-16
    )
