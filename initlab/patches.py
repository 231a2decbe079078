"""The patches of a batch: the numbers that each output of a layer is computed from."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from initlab.init import check_known


def windows_of(x: Tensor, layer: nn.Conv2d | nn.Linear, bias: str) -> tuple[Tensor, int, nn.Conv2d]:
    """Check the arguments; return the patches, how many they are, and the layer.

    The patches (N, channels, rows, columns, *kernel) are a view on the CPU, the layer is a Conv2d
    without values (of 1x1 pictures for a Linear), and without a bias if `bias` is "zeros".
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
    reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    sums = reach if conv.padding == "same" else [0, 0]
    if isinstance(conv.padding, tuple):
        sums = [2 * size for size in conv.padding]
    # The odd one of a sum stands at the end
    x = F.pad(x, [end for total in sums[::-1] for end in (total // 2, total - total // 2)])
    if reach[0] >= x.shape[2] or reach[1] >= x.shape[3]:
        size = tuple(x.shape[2:])
        raise ValueError(f"the kernel {sizes[2]} is larger than the padded picture {size}")
    for axis in (0, 1):
        x = x.unfold(axis + 2, reach[axis] + 1, conv.stride[axis])[..., :: conv.dilation[axis]]
    return x, x[:, 0, :, :, 0, 0].numel(), conv


def patches_of(windows: Tensor) -> Iterator[Tensor]:
    """Yield the patches, a column each, as blocks (channels * kernel, some) of about 8 MB."""
    for part in windows.split(max(1, 2**21 // windows[0].numel())):
        yield part.permute(1, 4, 5, 0, 2, 3).flatten(3).flatten(0, 2)
