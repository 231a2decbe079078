"""What a layer puts out at init: measured over many draws."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

from initlab.init import Activation, Scheme, drawer, scale_rule
from initlab.moments import Drawn
from initlab.patches import patches_of, windows_of

BLOCK = 2**20  # outputs computed at a time, and weights held at a time: 4 MB in float32


def draw(
    x: Tensor,
    layer: nn.Conv2d | nn.Linear,
    scheme: Scheme,
    a: float | Activation | None = None,
    bias: Literal["default", "zeros"] = "default",
    n: int = 1000,
    generator: Generator | int | None = None,
) -> Drawn:
    """Initialise `layer` anew `n` times and measure `layer(x)` each time, for every slope at once.

    A draw is what `initialize_` makes of a layer like this; `layer` is left as it is. Arguments and
    errors are those of `predict`, with "orthogonal" as well, and a `generator` as in `initialize_`;
    a ValueError, too, if `n` is below 1. Memory does not grow with `n`, but for the result.

    >>> draw(torch.ones(8, 1, 12, 12), nn.Conv2d(1, 4, 3), "default", n=500).each(0.0).rms.shape
    torch.Size([500])
    """
    if n < 1:
        raise ValueError(f"the number of draws n must be 1 or more, got {n}")
    windows, positions, conv = windows_of(x, layer, bias)
    redraw = drawer(conv, scheme, scale_rule(scheme, a), bias, generator)
    filters, groups = conv.out_channels, conv.groups
    count = positions * filters
    at_once = max(1, min(n, 128, BLOCK // max(filters, conv.weight.numel())))
    columns = max(1, BLOCK // (at_once * filters))
    halves = torch.empty(n, 4, dtype=torch.float64, device="cpu")
    # A bar only for what takes longer than two seconds
    with torch.no_grad(), tqdm(total=n, desc=f"draw {scheme}", unit="draw", delay=2) as bar:
        for rows in halves.split(at_once):
            k, weights = len(rows), []
            for _ in range(k):
                redraw()
                shift = conv.weight.new_zeros(filters) if conv.bias is None else conv.bias
                weights.append(torch.cat([conv.weight.flatten(1), shift[:, None]], 1))
            # All draws side by side: (groups, k * filters / groups, fan_in + 1)
            weight = torch.stack(weights).unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2)
            weight = weight.to(windows.dtype)
            sums = halves.new_zeros(4, k)
            for block in patches_of(windows):
                # Nearly half of MNIST's 5x5 patches are one, black only: it is computed once
                other = (block != block[:, :1]).any(0)
                # A row of ones takes the bias: adding it by itself costs a pass over the outputs
                block = F.pad(block.unflatten(0, (groups, -1)), (0, 0, 0, 1), value=1.0)
                sums += (~other).sum() * _half_sums(weight @ block[..., :1], k)
                for p in block[..., other].split(columns, 2):
                    sums += _half_sums(weight @ p, k)
            rows.copy_(sums.T / count)
            bar.update(k)
    return Drawn(halves, count)


def _half_sums(y: Tensor, k: int) -> Tensor:
    """Return sums (4, k) of y+, y-, y+^2, y-^2 of y (groups, k * filters, positions); clamps y."""
    y = y.unflatten(1, (k, -1))

    def sums(v: Tensor) -> tuple[Tensor, Tensor]:
        # Each filter's positions are summed in the data's type, and those in float64
        norm = torch.linalg.vector_norm(v, dim=3).double()
        return v.sum(3).double().sum((0, 2)), norm.square().sum((0, 2))

    mean, square = sums(y)
    mean_above, square_above = sums(y.clamp_min_(0))
    return torch.stack([mean_above, mean - mean_above, square_above, square - square_above])
