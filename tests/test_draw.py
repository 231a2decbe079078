"""`draw` against torch's own layers."""

import math

import pytest
import torch
from layers import PICTURE, SLOPES, close, correlated, every_layer, every_type, generator
from torch import nn
from torch.nn import functional

from initlab import draw, initialize_, predict
from initlab import draws as module

# That torch's own padding="same" copies the picture is no concern of the comparison
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@every_layer
@every_type
@pytest.mark.parametrize(
    ("scheme", "bias"), [("kaiming_normal", "default"), ("orthogonal", "zeros"), ("default",) * 2]
)
def test_draws_are_those_of_initialize_(make, shape, dtype, scheme, bias):
    x, layer = correlated(shape, dtype), make(dtype=dtype)
    how = {"a": 0.5} if scheme.startswith("kaiming") else {}
    drawn = draw(x, layer, scheme, bias=bias, n=3, generator=generator(7), **how)
    g = generator(7)
    # Sums of a few hundred terms: some tens of roundings
    off = 100 * torch.finfo(dtype).eps
    for i in range(3):
        initialize_(layer, scheme, bias=bias, generator=g, **how)
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
    with pytest.warns(UserWarning, match="its sd's are rough"):
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
    sizes, half_sums = [], module._half_sums

    def measured(y, k):
        sizes.append(y.numel())
        return half_sums(y, k)

    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "_half_sums", measured)
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


@pytest.mark.parametrize("n", [0, -1])
def test_number_of_draws(n):
    with pytest.raises(ValueError, match=f"n must be 1 or more, got {n}"):
        draw(PICTURE, nn.Conv2d(3, 4, 3), "default", n=n)


def test_orthogonal_needs_more_than_half_precision():
    with pytest.raises(ValueError, match="needs float32 or float64, got torch"):
        draw(PICTURE, nn.Conv2d(3, 4, 3).half(), "orthogonal", n=1)


@pytest.mark.parametrize("size", [224, 512])
def test_large_pictures_in_float32(size):
    x, layer = torch.randn(1, 1, size, size, generator=generator()), nn.Conv2d(1, 64, 3)
    single, double = (
        draw(t, layer, "default", n=1, generator=generator()).halves for t in (x, x.double())
    )
    torch.testing.assert_close(single, double, rtol=1e-5, atol=0)
