"""What a layer puts out at init, measured: many draws of its weights, one pass each."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from tqdm import tqdm

from initlab.init import Scheme, initialize_
from initlab.moments import Drawn
from initlab.patches import as_conv, count_patches, patches

BLOCK = 2**20  # outputs computed at a time, and weights held at a time: 4 MB in float32


def draw(
    x: Tensor,
    conv: nn.Conv2d | nn.Linear,
    scheme: Scheme,
    a: float = 0.0,
    bias: Literal["default", "zeros"] = "default",
    n: int = 1000,
    generator: Generator | None = None,
    *,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
) -> Drawn:
    """Initialise `conv` anew `n` times and measure `conv(x)` each time, for every slope at once.

    A draw is what `initialize_(layer, scheme, a, mode, bias, generator)` makes of a layer like
    `conv`; `conv` itself is left as it is. Memory does not grow with `n`, but for the result. The
    work is done on the CPU.

    Args:
        x: Batch of shape (N, C, H, W) for a Conv2d, (N, in_features) for a Linear.
        conv: The layer; zero padding only.
        scheme: As in `initialize_`.
        a: Negative slope that the Kaiming schemes assume.
        bias: "default" draws it anew each time, "zeros" leaves it out.
        n: Number of draws.
        generator: Source of the random numbers; by default torch's global one.
        mode: As in `initialize_`, for the Kaiming schemes.

    Raises:
        ValueError: `n` < 1; unknown scheme, bias or mode; `a` not finite; `x` empty, not finite, of
            another number of channels or smaller than the kernel; padding by anything but zeros; a
            lazy layer.
        TypeError: `conv` is neither Conv2d nor Linear; `x` is no floating-point tensor.

    Example:
        >>> import torch
        >>> from initlab import draw, predict
        >>> g = torch.Generator().manual_seed(0)
        >>> x, conv = torch.randn(8, 1, 12, 12, generator=g), torch.nn.Conv2d(1, 4, 3)
        >>> drawn = draw(x, conv, "default", n=500, generator=g).at(0.0)
        >>> predicted = predict(x, conv, "default").at(0.0)
        >>> tuple(drawn.rms.shape), abs(drawn.mean.mean() - predicted.mean).item() < 0.02
        ((500,), True)
    """
    if n < 1:
        raise ValueError(f"the number of draws n must be 1 or more, got {n}")
    x, conv = as_conv(x, conv, bias)
    groups, count = conv.groups, count_patches(x, conv) * conv.out_channels
    at_once = max(1, min(n, 128, BLOCK // max(conv.out_channels, conv.weight.numel())))
    columns = max(1, BLOCK // (at_once * conv.out_channels))
    # One buffer for all outputs: fresh memory for each costs as much time as computing them
    buffer = x.new_empty(at_once * conv.out_channels * columns)
    halves = torch.empty(n, 4, dtype=torch.float64)
    # A bar only for what takes longer than two seconds
    with torch.no_grad(), tqdm(total=n, desc=f"draw {scheme}", unit="draw", delay=2) as bar:
        for rows in halves.split(at_once):
            k, weights = len(rows), []
            for _ in range(k):
                initialize_(conv, scheme, a, mode, bias, generator)
                shift = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias
                weights.append(torch.cat([conv.weight.flatten(1), shift[:, None]], 1))
            weight = _by_group(weights, groups).to(x.dtype)
            sums = torch.zeros(4, k, dtype=torch.float64)
            for part in patches(x, conv):
                # A row of ones takes the bias: adding it by itself costs a pass over the outputs
                for p in F.pad(part, (0, 0, 0, 1), value=1.0).split(columns, 2):
                    y = buffer[: k * conv.out_channels * p.shape[2]].view(groups, -1, p.shape[2])
                    torch.bmm(weight, p, out=y)
                    sums += _half_sums(y.view(groups, k, -1, p.shape[2]))
            rows.copy_(sums.T / count)
            bar.update(k)
    return Drawn(halves, count)


def _by_group(draws: list[Tensor], groups: int) -> Tensor:
    """Make k draws (out_channels, ...) one wide layer (groups, k * out_channels / groups, ...)."""
    return torch.stack(draws).unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2)


def _half_sums(y: Tensor) -> Tensor:
    """Return the sums (4, k) of y+, y-, y+^2, y-^2 of outputs y (groups, k, filters, positions).

    Overwrites y. Each filter's positions are summed in the data's type, and those in float64.
    """

    def sums(v: Tensor) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(v, dim=3).double()
        return v.sum(3).double().sum((0, 2)), norm.square().sum((0, 2))

    mean, square = sums(y)
    mean_above, square_above = sums(y.clamp_min_(0))
    return torch.stack([mean_above, mean - mean_above, square_above, square - square_above])
