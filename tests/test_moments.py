"""`stats` against torch in float64; how moments print, and what a prediction covers."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from initlab import DrawnMoments, PredictedMoments, Stats, stats
from initlab.moments import _root

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EPS = torch.finfo(torch.float64).eps


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def assert_equals_torch(x):
    wide = x.detach().to(torch.float64)
    # A sum of n terms is off by no more than n roundings, whichever order they are added in
    off = wide.numel() * EPS
    size = wide.abs().mean().item()
    s = stats(x)
    assert s.mean == pytest.approx(wide.mean().item(), rel=0, abs=off * size)
    assert s.std == pytest.approx(torch.std(wide, unbiased=True).item(), rel=off)
    assert s.rms == pytest.approx(wide.norm().item() / math.sqrt(wide.numel()), rel=off)
    assert all(type(value) is float for value in s)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1000,), (4, 3, 5, 5), (2, 1)])
def test_equals_torch(dtype, shape):
    assert_equals_torch(3 * normal(*shape, dtype=dtype) + 1)


def test_sums_in_float64():
    # In float32, the roundings of the squares alone are as large as the spread
    assert_equals_torch(normal(10_000) + 10_000)
    # In float16, the sum of the squares, and every square, overflow
    assert_equals_torch(300 * normal(10_000, dtype=torch.float16) + 300)


def test_of_views():
    x = normal(6, 4, 5)
    assert_equals_torch(x.transpose(0, 2)[::2])
    assert_equals_torch(x[:, :1].expand(6, 4, 5))


def test_ties_mean_std_and_rms():
    x = normal(7) + 0.5
    mean, std, rms = stats(x)
    assert rms**2 == pytest.approx(mean**2 + std**2 * 6 / 7, rel=20 * EPS)


def test_prints_four_decimals():
    assert repr(Stats(1.23456, 0.00004, 100.0)) == "mean 1.2346, std 0.0000, rms 100.0000"
    assert repr(Stats(-1.5, 2.0, 2.5)) == "mean -1.5000, std 2.0000, rms 2.5000"


@pytest.mark.parametrize("mean", [-0.0, -1e-9, -0.00004])
def test_prints_no_negative_zero(mean):
    assert repr(Stats(mean, 1.0, 1.0)) == "mean 0.0000, std 1.0000, rms 1.0000"


def test_works_on_parameters_and_graphs():
    weight = nn.Parameter(normal(4, 5))
    assert_equals_torch(weight)
    assert_equals_torch(weight.exp())
    assert weight.grad is None


def test_leaves_the_tensor_alone():
    x = normal(9, dtype=torch.float64)
    before = x.clone()
    stats(x)
    assert torch.equal(x, before)


def test_single_element_has_no_std():
    mean, std, rms = stats(torch.tensor(-3.0))
    assert (mean, rms) == (-3.0, 3.0)
    assert math.isnan(std)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_refuses_empty(shape):
    with pytest.raises(ValueError, match=r"empty tensor, shape \(.*0"):
        stats(torch.empty(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_refuses_other_types(dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        stats(torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("x", [[1.0, 2.0], 1.0, None])
def test_refuses_what_is_no_tensor(x):
    with pytest.raises(
        TypeError, match=rf"needs a tensor of real floats.*, got {type(x).__name__}"
    ):
        stats(x)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf]])
def test_refuses_what_is_not_finite(dtype, bad):
    x = torch.tensor([1.0, 2.0, *bad], dtype=dtype)
    with pytest.raises(ValueError, match=f"{len(bad)} of {len(x)} are nan or infinite"):
        stats(x)


TOLD = PredictedMoments(0.0, 1.0, 2.0, 0.1, 0.01, 0.001)


def test_moments_print():
    told = PredictedMoments(-0.00001, 1.25, 1.5, 0.1, 0.2, 0.3)
    assert repr(told) == "mean 0.0000 ± 0.1000, std 1.2500 ± 0.2000, rms 1.5000 ± 0.3000"
    assert repr(DrawnMoments(*told[:6], n=7)) == repr(told)


@pytest.mark.parametrize("n", [1, 4, 10_000])
@pytest.mark.parametrize(
    ("mean", "std", "rms", "covered"),
    [
        (0.49, 1.0, 2.0, True),
        (-0.49, 0.951, 2.0049, True),
        (0.51, 1.0, 2.0, False),
        (-0.51, 1.0, 2.0, False),
        (0.0, 1.051, 2.0, False),
        (0.0, 1.0, 1.9949, False),
        (math.nan, 1.0, 2.0, False),
        (0.0, 1.0, math.inf, False),
    ],
)
def test_covers(n, mean, std, rms, covered):
    if n == 1:
        assert TOLD.covers(Stats(mean, std, rms)) == covered
    off = [(v - t) / math.sqrt(n) + t for v, t in zip((mean, std, rms), TOLD, strict=False)]
    assert TOLD.covers(DrawnMoments(*off, 9.0, 9.0, 9.0, n=n)) == covered


@pytest.mark.parametrize("measured", [TOLD, (0.0, 1.0, 2.0), None])
def test_only_what_was_measured_is_covered(measured):
    with pytest.raises(TypeError, match="only what was measured"):
        TOLD.covers(measured)


def test_nothing_is_covered_in_doubt():
    with pytest.raises(ValueError, match="not known: two numbers"):
        TOLD._replace(doubt="two numbers").covers(Stats(0.0, 1.0, 2.0))


@pytest.mark.parametrize("k", [0.5, 1.0, 3.0, 40.0, 1e5, 1e8])
@pytest.mark.parametrize("constant", [0.0, 0.5])
def test_root_of_a_shifted_gamma_number(k, constant):
    """Of shape k: by its closed form, or by many quantiles if it is shifted."""
    gamma = scipy.stats.gamma(k, loc=constant * k)
    mean, variance = gamma.mean(), gamma.var()
    skew = gamma.stats("s") / (2 * math.sqrt(variance) / mean)
    root, sd = _root(mean, variance, float(skew))
    if k < 1e4:
        expected = gamma.expect(np.sqrt)
        assert root == pytest.approx(expected, rel=1e-6)
        assert sd == pytest.approx(math.sqrt(mean - expected**2), rel=1e-4)
    else:
        assert sd == pytest.approx(math.sqrt(variance / mean) / 2, rel=1e-4)
