"""The patches of a batch: the numbers that one output of a layer is computed from."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from initlab.init import fans


def as_conv(x: Tensor, conv: nn.Module, bias: str) -> tuple[Tensor, nn.Conv2d]:
    """Check the arguments; return x zero-padded, and a Conv2d without padding, of its own values.

    A Linear becomes the 1x1 convolution that it is, over pictures of one pixel. Both are returned
    on the CPU.
    """
    if bias not in ("default", "zeros"):
        raise ValueError(f"unknown bias {bias!r}; known are default, zeros")
    if not isinstance(conv, nn.Conv2d | nn.Linear):
        raise TypeError(f"needs a Conv2d or a Linear, got {type(conv).__name__}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x))}")
    if any(is_lazy(parameter) for parameter in conv.parameters()):
        raise ValueError(f"{conv} has no shape before its first input; run it once")
    if isinstance(conv, nn.Linear):
        channels, out_channels, kernel, options = conv.in_features, conv.out_features, (1, 1), {}
        expected, shape = f"(N, {channels}), by x.flatten(0, -2) from more dimensions,", x.shape
        fits = x.dim() == 2
        x = x[:, :, None, None] if fits else x
    else:
        if conv.padding_mode != "zeros":
            raise ValueError(f"only zero padding is covered, got {conv.padding_mode!r}")
        channels, out_channels, kernel = conv.in_channels, conv.out_channels, conv.kernel_size
        options = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
        expected, shape = f"(N, {channels}, H, W)", x.shape
        fits = x.dim() == 4
    if not fits or x.shape[1] != channels or x.numel() == 0:
        raise ValueError(f"x must have shape {expected} and not be empty, got {tuple(shape)}")
    if not x.isfinite().all():
        raise ValueError("x has values that are nan or infinite")
    if isinstance(conv, nn.Conv2d):
        x = F.pad(x, _sides(conv))
    plain = nn.utils.skip_init(
        nn.Conv2d,
        channels,
        out_channels,
        kernel,
        bias=conv.bias is not None,
        # Not of conv.weight: to read a parametrised one computes it, which may change the layer
        dtype=next(conv.parameters()).dtype,
        **options,
    )
    if any(d * (k - 1) >= s for d, k, s in zip(plain.dilation, kernel, x.shape[2:], strict=True)):
        size = tuple(x.shape[2:])
        raise ValueError(f"the kernel {kernel} is larger than the padded picture {size}")
    # Half precision cannot hold the sums
    return x.detach().to("cpu", torch.promote_types(x.dtype, torch.float32)), plain


def _sides(conv: nn.Conv2d) -> list[int]:
    """Return how many zeros the layer puts left, right, above and below, in the order of F.pad."""
    if conv.padding == "same":  # the odd one goes right and below
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        rows, columns = ((total // 2, total - total // 2) for total in totals)
    elif conv.padding == "valid":
        rows = columns = (0, 0)
    else:
        rows, columns = ((p, p) for p in conv.padding)
    return [*columns, *rows]


def count_patches(x: Tensor, conv: nn.Conv2d) -> int:
    """Return the number of patches of the padded batch x, over all pictures."""
    spans = zip(x.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True)
    return x.shape[0] * math.prod((size - d * (k - 1) - 1) // s + 1 for size, k, s, d in spans)


def patches(x: Tensor, conv: nn.Conv2d) -> Iterator[Tensor]:
    """Yield the patches of x, of shape (groups, n, some): 16 MB of float32, or one picture's."""
    groups, n = conv.groups, fans(conv.weight)[0]
    per_picture = groups * n * count_patches(x, conv) // len(x)
    for part in x.split(max(1, 2**22 // per_picture)):
        p = F.unfold(part, conv.kernel_size, conv.dilation, stride=conv.stride)
        p = p.unflatten(1, (groups, n)).permute(1, 2, 0, 3)  # (groups, n, pictures, positions)
        yield p.flatten(2)
