"""Mean, std and rms of a tensor, the three numbers that the series is about."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Stats(NamedTuple):
    """Mean, std (unbiased) and rms, the root of the mean square, of all elements of a tensor."""

    mean: float
    std: float
    rms: float

    def __repr__(self) -> str:
        # "z" prints a rounded -0.00004 as 0.0000: the sign of a rounded zero is noise.
        return f"mean {self.mean:z.4f}, std {self.std:.4f}, rms {self.rms:.4f}"


def stats(x: Tensor) -> Stats:
    """Return the mean, std and rms over all elements of `x`, summed in float64 without a graph.

    The float64 sums make the four printed decimals independent of the number of threads. They are
    tied by `rms**2 = mean**2 + std**2 * (n - 1) / n` for n elements.

    Args:
        x: Floating-point tensor of any shape, with at least one element.

    Returns:
        Three Python floats. The std is the unbiased one of `torch.std`; of one element it is nan.

    Raises:
        TypeError: `x` is not a tensor, or not of a real floating-point type.
        ValueError: `x` is empty, or has an element that is nan or infinite.

    Example:
        >>> import torch
        >>> from initlab import stats
        >>> stats(torch.tensor([3.0, 4.0, 5.0]))
        mean 4.0000, std 1.0000, rms 4.0825
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"stats needs a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"stats needs real floating-point values, got {x.dtype}; use x.float()")
    if x.numel() == 0:
        raise ValueError(f"stats of an empty tensor, shape {tuple(x.shape)}")
    with torch.no_grad():
        x = x.detach().double()
        mean, rms = x.mean().item(), x.square().mean().sqrt().item()
        bad = 0 if math.isfinite(rms) else x.numel() - int(x.isfinite().sum())
        if bad:
            raise ValueError(f"stats needs finite values: {bad} of {x.numel()} are nan or infinite")
        std = x.std().item() if x.numel() > 1 else math.nan
    return Stats(mean, std, rms)
