"""The patches of a batch: the numbers that each output of a layer is computed from."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from initlab.init import check_known


def windows_of(x: Tensor, layer: nn.Conv2d | nn.Linear, bias: str) -> tuple[Tensor, nn.Conv2d]:
    """Check the arguments; return the patches (N, channels, rows, columns, *kernel) and the layer.

    The patches are a view on the CPU, the layer is a Conv2d without values (of 1x1 pictures for a
    Linear), and without a bias if `bias` is "zeros".
    """
    check_known("bias", bias, ("default", "zeros"))
    kind = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    if not isinstance(layer, kind):
        raise TypeError(f"needs a Conv2d or a Linear, got {type(layer).__name__}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x))}")
    if any(is_lazy(parameter) for parameter in layer.parameters()):
        raise ValueError(f"{layer} has no shape before its first input; run it once")
    own = "forward" in vars(layer) or type(layer).forward is not kind.forward
    if own or "weight" not in dict(layer.named_parameters(recurse=False)):
        raise ValueError(f"{layer} computes its weight or its output in a way of its own")
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        raise ValueError(f"only zero padding is covered, got {layer.padding_mode!r}")
    if isinstance(layer, nn.Linear):
        sizes, settings = (layer.in_features, layer.out_features, 1), {}
        dims, expected = 2, f"(N, {layer.in_features})"
    else:
        sizes = layer.in_channels, layer.out_channels, layer.kernel_size
        settings = {k: getattr(layer, k) for k in ("stride", "padding", "dilation", "groups")}
        dims, expected = 4, f"(N, {layer.in_channels}, H, W)"
    if x.dim() != dims or x.shape[1] != sizes[0] or x.numel() == 0:
        raise ValueError(f"x must have shape {expected} and not be empty, got {tuple(x.shape)}")
    if x.is_meta or not x.isfinite().all():
        raise ValueError("x has values that are nan or infinite, or none (on the meta device)")
    settings |= {"dtype": layer.weight.dtype, "bias": layer.bias is not None and bias == "default"}
    conv = nn.utils.skip_init(nn.Conv2d, *sizes, **settings)

    # Half precision cannot hold the sums
    x = x.detach().to("cpu", torch.promote_types(x.dtype, torch.float32))
    x = x if dims == 4 else x[..., None, None]
    if conv.padding == "same":  # the odd one of a sum stands at the end
        sums = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        ends = [(total // 2, total - total // 2) for total in sums]
    else:
        ends = [(0, 0)] * 2 if conv.padding == "valid" else [(size,) * 2 for size in conv.padding]
    x = F.pad(x, [*ends[1], *ends[0]])
    size, axes = tuple(x.shape[2:]), zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)
    for axis, (k, stride, d) in enumerate(axes, 2):
        if d * (k - 1) >= x.shape[axis]:
            raise ValueError(f"the kernel {sizes[2]} is larger than the padded picture {size}")
        x = x.unfold(axis, d * (k - 1) + 1, stride)[..., ::d]
    return x, conv


def patches_of(windows: Tensor) -> Iterator[Tensor]:
    """Yield the patches, a column each, as blocks (channels * kernel, some) of about 16 MB."""
    for part in windows.split(max(1, 2**22 // windows[0].numel())):
        yield part.permute(1, 4, 5, 0, 2, 3).flatten(3).flatten(0, 2)


def count_positions(windows: Tensor) -> int:
    """Return the number of patches, over all pictures."""
    return windows[:, 0, :, :, 0, 0].numel()
