"""`predict` and `draw` against each other, against torch's own layers, and against enumeration.

Enumeration knows nothing of patches: a layer is linear in its weights, so that passing each weight
alone through the layer gives all that the closed formulas speak of.
"""

import csv
import math
import subprocess
import sys
from itertools import groupby
from operator import itemgetter

import prove_predict
import pytest
import torch
from layers import (
    PICTURE,
    SLOPES,
    close,
    correlated,
    every_layer,
    every_type,
    generator,
    responses,
)
from torch import nn
from torch.nn import functional

from initlab import draw, gain, initialize_, load_mnist, predict
from initlab import prediction as module

# That torch's own padding="same" copies the picture is no concern of the comparison
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:.*sd's are rough"),  # of the small layers here
]


def weight_std(layer, scheme, a):
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(layer.weight)
    if scheme.startswith("xavier"):
        return math.sqrt(2 / (fan_in + fan_out))
    a = math.sqrt(5) if scheme == "default" else a
    return nn.init.calculate_gain("leaky_relu", a) / math.sqrt(fan_in)


def slope_for(scheme):
    return {"a": 0.5} if scheme.startswith("kaiming") else {}


def bias_bound(layer, bias):
    has_one = layer.bias is not None and bias == "default"
    return 1 / math.sqrt(layer.weight[0].numel()) if has_one else 0.0


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
    size = (V * R.square().sum(1)).sqrt().mean()  # E|y| of Gaussian ones is sqrt(2 / pi) of it
    out_channels = len(layer.weight)
    mean_var = (V * mu2 + U).mean() / out_channels
    fourth = 0.0 if "normal" in scheme else -6 / 5  # excess kurtosis
    square_var = 2 * (M @ M).diagonal(0, 1, 2).sum(1) + fourth * (M.diagonal(0, 1, 2) ** 2).sum(1)
    square_var = (V**2 * square_var + 4 * U * V * mu2).mean() + B**4 / 5 - U**2
    square_var = square_var / out_channels

    predicted = predict(x, layer, scheme, bias=bias, **slope_for(scheme))
    n = R.shape[2] * out_channels
    assert predicted.count == n
    assert predicted.at() == predicted.at(1.0)
    y = predicted.at(1.0)
    assert y.mean == pytest.approx(0, abs=1e-15 * math.sqrt(power))
    assert y.rms == close(power.sqrt(), 1e-10)
    assert y.std == close((n / (n - 1) * (power - mean_var)).sqrt(), 1e-10)
    assert y.mean_sd == close(mean_var.sqrt(), 1e-10)
    assert predicted.covariance[2:, 2:].sum().item() == close(square_var, 1e-10)
    for slope in SLOPES:
        moments = predicted.at(slope)
        assert moments.rms**2 == close((1 + slope**2) / 2 * power, 1e-10)
        if scheme == "kaiming_normal":
            mean = (1 - slope) * size / math.sqrt(2 * math.pi)
            assert moments.mean == pytest.approx(mean.item(), rel=1e-10, abs=1e-15)
        spread = n / (n - 1) * (moments.rms**2 - moments.mean**2 - moments.mean_sd**2)
        assert moments.std == close(math.sqrt(spread), 1e-10)


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
    predicted = predict(x, layer, scheme, bias=bias, **slope_for(scheme))
    for slope in SLOPES:
        assert predicted.at(slope).rms ** 2 == close(squares[slope] / parts, 1e-10)
    moments = predicted.at(1.0)
    assert moments.mean_sd == close(math.sqrt(mean_var / parts), 1e-10)
    assert predicted.covariance[2:, 2:].sum().item() == close(square_var / parts, 1e-10)


def test_covariance_from_all_directions():
    # Two Gaussian weights are a direction and an independent length L. Half-moments are
    # proportional to L, or to L^2, of E[L^k] = 2^(k/2) gamma(1 + k/2).
    # The rule of equal steps h is off by h^2 / 12 times the jumps of the slope, about 1e-9 here.
    x, layer = correlated((7, 2)), nn.Linear(2, 3, bias=False)
    angle = torch.arange(2**16, dtype=torch.float64) * (2 * math.pi / 2**16)
    std = weight_std(layer, "kaiming_normal", 0.5)
    y = std * (x[:, :1] * angle.cos() + x[:, 1:] * angle.sin())
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
    assert predicted.at(0.0).mean == close(mean, 1e-5)  # but for the bias, which is uniform


def test_a_sample_of_the_patches_stands_for_all(monkeypatch):
    x, layer = correlated((9, 1, 18, 18)), nn.Conv2d(1, 3, 5)  # 1,764 patches
    x[0] *= 10  # one picture has almost all of the energy
    sampled = pair_parts(predict(x, layer, "kaiming_normal"))
    monkeypatch.setattr(module, "PAIRS_FROM", 1764)
    of_all = pair_parts(predict(x, layer, "kaiming_normal"))
    torch.testing.assert_close(sampled, of_all, rtol=0.01, atol=0)
    # That of y with y|y| is a sum over single patches, of all
    assert torch.isclose(sampled, of_all, rtol=1e-9).tolist() == [False, False, False, True]


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
    drawn = draw(x, layer, scheme, bias=bias, n=n, generator=generator(1), **slope_for(scheme))
    predicted = predict(x, layer, scheme, bias=bias, **slope_for(scheme))

    for slope in (0.0, 1.0):
        seen, told = drawn.each(slope), predicted.at(slope)
        assert told.covers(drawn.at(slope))
        ses = {k: getattr(seen, k).square().std() / math.sqrt(n) for k in ("std", "rms")}
        assert abs(seen.rms.square().mean() - told.rms**2) <= 5 * ses["rms"]
        assert abs(seen.std.square().mean() - told.std**2) <= 5 * ses["std"]
        for name in ("mean", "std", "rms"):
            values, sd = getattr(seen, name), getattr(told, name + "_sd")
            assert abs(values.std() - sd) <= 5 * standard_error_of_sd(values) + 0.01 * sd, name


def test_mean_with_uniform_weights():
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
    assert abs(low - 1) < 3 * error
    assert error < 0.001


@pytest.mark.parametrize("sd", [0.0, 1e-3, 0.1, 1.0, 30.0, 1e6])
def test_mean_size_of_a_gaussian_and_a_uniform_number(sd):
    u = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16  # of U(-1, 1), half
    z = u / (sd or 1e-300)
    density = sd * math.sqrt(2 / math.pi) * (-z * z / 2).exp()
    expected = (density + u * torch.erf(z / math.sqrt(2))).mean().item()
    ones = torch.ones(1, dtype=torch.float64)
    told = module._mean_abs((sd**2 + 1 / 3) * ones, -6 / 5 * ones / 9, ones)
    assert told.item() == close(expected, 1e-6)


@pytest.mark.parametrize(("n", "off"), [(1, 1e-9), (2, 0.002), (3, 0.003), (5, 0.001), (25, 1e-4)])
def test_mean_size_of_a_sum_of_uniform_numbers(n, off):
    # E|y| is 2/pi times the integral of (1 - characteristic function) / t^2
    t = torch.arange(200_000, dtype=torch.float64) * 1e-3 + 5e-4
    expected = 2 / math.pi * (((1 - (t.sin() / t) ** n) / t**2).sum() * 1e-3 + 1 / 200)
    ones = torch.ones(1, dtype=torch.float64)
    told = module._mean_abs(n / 3 * ones, -6 / 5 * n / 9 * ones, ones)
    assert told.item() == close(expected, off + 1e-5)


def test_padding_that_was_changed_in_place():
    x, layer = torch.randn(2, 3, 12, 12, generator=generator()), nn.Conv2d(3, 8, 3, padding=1)
    layer.dilation = layer.padding = (2, 2)
    assert predict(x, layer, "default").count == draw(x, layer, "default", n=1).count
    assert predict(x, layer, "default").count == layer(x).numel()


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight, self.bias)


@pytest.mark.parametrize(
    "layer",
    [
        Standardised(3, 4, 3),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)),
    ],
)
def test_layers_that_compute_otherwise_are_refused(layer):
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    for call in both(PICTURE, layer, "default"):
        with pytest.raises(ValueError, match="in a way of its own"):
            call()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_any_default_device():
    x, layer = correlated((2, 2, 6, 6)), nn.Conv2d(2, 4, 3)
    expected = predict(x, layer, "default"), draw(x, layer, "default", n=2, generator=0)
    with torch.device("meta"):
        empty = torch.zeros(2, 2, 6, 6)
        found = predict(x, layer, "default"), draw(x, layer, "default", n=2, generator=0)
        nowhere = predict(x, nn.Conv2d(2, 4, 3), "default")
        assert found[0].at(0.3) == nowhere.at(0.3) == expected[0].at(0.3)
        assert found[1].at(0.3) == expected[1].at(0.3)
    for call in both(empty, layer, "default"):
        with pytest.raises(ValueError, match="meta device"):
            call()


@pytest.mark.parametrize("scheme", ["kaiming_normal", "kaiming_uniform"])
def test_an_activation_for_a(scheme):
    x, layer = correlated((2, 2, 6, 6)), nn.Conv2d(2, 4, 3, groups=2)
    told, by_activation = (predict(x, layer, scheme, a=a).at() for a in (0.3, nn.LeakyReLU(0.3)))
    assert told.rms == close(by_activation.rms, 1e-9)
    factor = gain(functional.gelu) ** 2
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


def test_leading_term_from_the_closed_forms_of_gaussian_weights(monkeypatch):
    # E of the second derivatives of f(y) and g(y') are derivatives of E f(y) g(y') by covariances
    x, layer = torch.randn(2, 4, dtype=torch.float64, generator=generator()), nn.Linear(4, 1, False)
    P, pi, root, small = x.T / math.sqrt(12), math.pi, math.sqrt(2 / math.pi), 1e-5

    def products(K):
        s, t = K[0].sqrt(), K[2].sqrt()
        r = K[1] / (s * t)
        w, asin = (1 - r * r).sqrt(), r.asin()
        of_sizes = 2 / pi * s * t * (w + r * asin)
        odd = 2 / pi * s * s * t * t * (3 * r * w + (1 + 2 * r * r) * asin)
        return of_sizes, odd, s * s * t * root * (1 + r * r), 2 * s * s * t * root * r

    def leading(which, p, q):
        K = torch.stack([p @ p, p @ q, q @ q])
        H = torch.autograd.functional.hessian(lambda K: products(K)[which], K)
        k = [(p**i * q ** (4 - i)).sum() for i in range(5)]
        sizes = root * K[0].sqrt(), root * K[2].sqrt()
        low = -root * k[4] / (24 * K[0] ** 1.5), -root * k[0] / (24 * K[2] ** 1.5)
        of_means = (sizes[0] * low[1] + sizes[1] * low[0], 0, K[0] * low[1], 0)[which]
        fourth = (k[4] * H[0, 0] + k[0] * H[2, 2]) / 6 + (k[3] * H[0, 1] + k[1] * H[1, 2]) / 3
        return fourth + k[2] * H[1, 1] / 4 - of_means

    def found(kurtosis):
        monkeypatch.setattr(module, "KURTOSIS", kurtosis)
        return pair_parts(predict(x, layer, "default"))

    monkeypatch.setattr(module, "SIXTH", 0.0)
    change = (found(small) - found(-small)) / (2 * small)
    for which, at_1 in enumerate((1 / (6 * pi), 1.0, 7 / 24 * root, root / 4)):
        pairs = leading(which, P[:, 0], P[:, 1]) + leading(which, P[:, 1], P[:, 0])
        s = P.square().sum(0).sqrt()
        twice = at_1 * ((P**4).sum(0) / s ** (2, 0, 1, 1)[which]).sum()
        assert change[which].item() == close((pairs + twice) / 4, 1e-3)


DOUBTFUL = {
    "one weight an output": (torch.eye(10), nn.Linear(10, 32, bias=False), 0.0),
    "one filter": (correlated((3, 1, 9, 8)), nn.Conv2d(1, 1, 5), 0.0),
    "no activation, and few": (1 + 0.1 * correlated((9, 5)), nn.Linear(5, 2), 1.0),
    "a slope below 0": (2 + correlated((90, 25)), nn.Linear(25, 16), -1.0),
}


@pytest.mark.parametrize(("x", "layer", "slope"), DOUBTFUL.values(), ids=DOUBTFUL)
def test_what_is_in_doubt_is_said_and_covers_nothing(x, layer, slope):
    predicted = predict(x, layer, "kaiming_uniform")
    with pytest.warns(UserWarning, match="its sd's are rough"):
        told = predicted.at(slope)
    with pytest.raises(ValueError, match=f"not known: {told.doubt}"):
        told.covers(draw(x, layer, "kaiming_uniform", n=2).at(slope))


@pytest.mark.filterwarnings("error")
def test_usual_layers_are_not_in_doubt():
    x = load_mnist().x_valid[:10]
    for layer in (nn.Conv2d(1, 8, 5), nn.Conv2d(1, 32, 3, 2), nn.Conv2d(1, 8, 3, dilation=2)):
        for slope in (None, 0.0, 0.3, 2.5):
            assert not predict(x, layer, "default").at(slope).doubt


# The record -------------------------------------------------------------------------------------


def read_record():
    with prove_predict.RECORD.open(encoding="utf8") as file:
        return list(csv.DictReader(file))


def test_record_of_draws():
    record = read_record()
    cases = {name: len(list(rows)) for name, rows in groupby(record, itemgetter("case"))}
    assert cases == dict.fromkeys(prove_predict.CASES, 30)
    assert len(cases) >= 25
    assert prove_predict.bad(record) == []
    judged = [row for row in record if row["allowed"] != "nan"]
    assert len(judged) > 0.8 * len(record)
    assert all(row["number"].endswith("_sd") for row in record if row["allowed"] == "nan")


SOME = ["fan_in 5", "one picture", "black pictures, normal", "one bright row", "grouped", "noise"]


@pytest.mark.parametrize("case", SOME)
def test_record_is_that_of_today(case):
    again = list(prove_predict.rows(case, draws=1000))
    for row, kept in zip(again, (r for r in read_record() if r["case"] == case), strict=True):
        assert (str(row["slope"]), row["number"]) == (kept["slope"], kept["number"])
        told, drawn = float(row["predicted"]), float(row["drawn"])
        assert told == pytest.approx(float(kept["predicted"]), rel=1e-4, abs=1e-9)
        if kept["allowed"] != "nan":
            assert abs(told - drawn) <= float(kept["allowed"]) + 4 * float(row["error"])


# Errors -----------------------------------------------------------------------------------------

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
        (PICTURE, nn.Conv2d(3, 4, 3), {"scheme": "kaiming_normal", "a": math.nan}, "got nan"),
        (PICTURE, nn.Conv2d(3, 4, 3), {"scheme": "xavier_normal", "a": 0.0}, "assumes no slope"),
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


def test_orthogonal_is_not_predicted():
    with pytest.raises(ValueError, match="no prediction for scheme 'orthogonal'"):
        predict(PICTURE, nn.Conv2d(3, 4, 3), "orthogonal")


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
draw(x, layer, "default", n=5000)  # 88 MiB of outputs
print(mib("VmHWM") - few)

x, layer = torch.rand(5000, 1, 28, 28), nn.Conv2d(1, 8, 7, stride=2)  # 226 MiB of patches
predict(x[:50], layer, "default")
# Not VmRSS: under pressure the kernel drops pages of libraries, which come back and would count
before = mib("VmHWM")
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
    assert drawing < 40  # MiB
    assert predicting < 400  # about 250, most of it for the pairs of patches


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype):
    x, layer = torch.randn(1, 1, 64, 64, generator=generator()).to(dtype), nn.Conv2d(1, 64, 3)
    half, double = (
        draw(20 * t, layer, "default", n=1, generator=generator()).halves for t in (x, x.double())
    )
    torch.testing.assert_close(half, double, rtol=1e-2, atol=0)
    predict(x, layer, "default")


def test_pairs_do_not_grow_with_the_groups(monkeypatch):
    sizes, rest_of_pairs = [], module._rest_of_pairs

    def measured(p, *args):
        sizes.append(p.shape[1] ** 2)
        return rest_of_pairs(p, *args)

    monkeypatch.setattr(module, "_rest_of_pairs", measured)
    for groups in (1, 16):
        layer = nn.Conv2d(16, 16, 3, groups=groups)
        predict(torch.rand(4, 16, 28, 28, generator=generator()), layer, "default")
    assert len(sizes) == 17
    assert sum(sizes[1:]) < 1.1 * sizes[0]


@pytest.mark.parametrize("n", [800, 1000])  # the golden ratio picks some patches twice here
def test_a_patch_is_sampled_once_and_counts_with_itself_as_often_as_all_do(n, monkeypatch):
    # Orthogonal patches: only with itself does a patch covary, in 1 of n pairs
    x, layer = torch.eye(n), nn.Linear(n, 1, bias=False)
    sampled = predict(x, layer, "kaiming_normal").covariance
    monkeypatch.setattr(module, "PAIRS_FROM", n)
    torch.testing.assert_close(
        sampled, predict(x, layer, "kaiming_normal").covariance, rtol=1e-10, atol=1e-16
    )
