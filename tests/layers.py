"""Layers and data that `predict` and `draw` are tried on."""

import pytest
import torch
from torch import nn
from torch.nn import functional

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
PICTURE = torch.ones(2, 3, 6, 6)


def close(value, rel):
    return pytest.approx(float(value), rel=rel, abs=0)


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
