"""Kaiming's rule in a formula or two, and torch's initialisers applied to a whole network."""

import math
from typing import Literal, TypeVar, get_args

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.conv import _ConvNd  # the only common base of the six (transposed) convs
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

Scheme = Literal[
    "default", "kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform", "orthogonal"
]
Bias = Literal["keep", "zeros", "default"]
Module = TypeVar("Module", bound=nn.Module)


def gain(a: float) -> float:
    """Return Kaiming's gain sqrt(2 / (1 + a^2)) for a leaky ReLU of negative slope `a`.

    It is the number that the standard deviation 1/sqrt(fan_in) is multiplied by: sqrt(2) for a
    ReLU (a = 0), 1 for no activation (a = 1), and 1/sqrt(3) for a = sqrt(5).

    Source: He et al. 2015, arXiv 1502.01852, eq. 15 (there as a condition on the variance).

    Raises:
        ValueError: `a` is nan or infinite.

    Example:
        >>> from initlab import gain
        >>> gain(1.0), round(gain(0.0) ** 2, 6), round(gain(5**0.5) ** 2, 6)
        (1.0, 2.0, 0.333333)
    """
    if not math.isfinite(a):
        raise ValueError(f"the negative slope a must be finite, got {a}")
    return math.sqrt(2.0 / (1.0 + a**2))


def fans(weight: Tensor) -> tuple[int, int]:
    """Return (fan_in, fan_out) of the weight of a Linear, Conv1d, Conv2d or Conv3d layer.

    fan_in counts the products that are summed into one output, fan_out the outputs that one input
    goes into, both as torch counts them: stride, padding and the number of groups are left out.

    Args:
        weight: Tensor of shape (out_features, in_features) or
            (out_channels, in_channels / groups, *kernel_size).

    Raises:
        ValueError: `weight` has fewer than 2 dimensions.

    Example:
        >>> import torch
        >>> from initlab import fans
        >>> fans(torch.nn.Conv2d(1, 32, 5).weight)
        (25, 800)
    """
    if weight.dim() < 2:
        raise ValueError(f"fans need a weight of 2 or more dimensions, got {tuple(weight.shape)}")
    n_out, n_in, *kernel = weight.shape
    return n_in * math.prod(kernel), n_out * math.prod(kernel)


def initialize_(
    module: Module,
    scheme: Scheme,
    a: float = 0.0,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
    bias: Bias = "keep",
    generator: Generator | None = None,
) -> Module:
    """Draw the weight of every Linear and (transposed) convolution in `module` anew, in place.

    Layers are visited in the order of `module.modules()`, the weight before the bias. The drawing
    is done by `torch.nn.init`: the same generator state gives the same bits.

    Args:
        module: A layer or a network. Layers of other kinds (normalisation, embedding) are
            kept, unless they share a weight with one of these.
        scheme: "default" is what `reset_parameters` does to a weight, U(-1/sqrt(fan_in),
            1/sqrt(fan_in)); the others are the initialisers of torch of that name.
        a: Negative slope that the two Kaiming schemes assume. The other schemes know none.
        mode: "fan_in" or "fan_out", for the two Kaiming schemes.
        bias: "keep" leaves biases alone, as every `torch.nn.init.kaiming_*_` does, "zeros" clears
            them, "default" draws them as `reset_parameters` does.
        generator: Source of the random numbers; by default torch's global one.

    Returns:
        The `module` itself.

    Raises:
        ValueError: Unknown `scheme`, `mode` or `bias`; `a` not finite; nothing to initialise; a
            weight that has no shape yet (lazy) or is computed from others (weight norm);
            "orthogonal" in half precision, which torch cannot factorise. Nothing is changed then.

    Source: He et al. 2015, arXiv 1502.01852; Glorot & Bengio 2010; Saxe et al. 2013, arXiv
    1312.6120.

    Example:
        >>> import torch
        >>> from initlab import initialize_, stats
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 5), torch.nn.ReLU())
        >>> g = torch.Generator().manual_seed(0)
        >>> net = initialize_(net, "kaiming_normal", a=0.0, bias="zeros", generator=g)
        >>> stats(net[0].bias)
        mean 0.0000, std 0.0000, rms 0.0000
    """
    for name, value, known in (
        ("scheme", scheme, get_args(Scheme)),
        ("mode", mode, ("fan_in", "fan_out")),
        ("bias", bias, get_args(Bias)),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known are {', '.join(known)}")
    gain(a)  # refuses an `a` that is not finite
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | _ConvNd)]
    if not layers:
        raise ValueError(f"{type(module).__name__} holds no Linear or convolution to initialise")
    for layer in layers:
        # In this order: to read a parametrised weight computes it, which may change the layer
        if is_parametrized(layer, "weight") or not isinstance(layer.weight, nn.Parameter):
            raise ValueError(f"the weight of {layer} is computed (parametrised): nothing to draw")
        if is_lazy(layer.weight):
            raise ValueError(f"{layer} has no shape before its first input; run the network once")
        if scheme == "orthogonal" and layer.weight.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f'"orthogonal" needs float32 or float64, got {layer.weight.dtype}')
    for layer in layers:
        _draw_weight_(layer.weight, scheme, a, mode, generator)
        if layer.bias is not None and bias == "zeros":
            nn.init.zeros_(layer.bias)
        elif layer.bias is not None and bias == "default":
            fan_in, _ = fans(layer.weight)
            bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return module


def _draw_weight_(weight: Tensor, scheme: Scheme, a: float, mode: str, generator) -> None:
    """Draw one weight; through a contiguous buffer, as reset_parameters does, for any layout."""
    buffer = torch.empty_like(weight, memory_format=torch.contiguous_format, requires_grad=False)
    match scheme:
        case "default":
            nn.init.kaiming_uniform_(buffer, a=math.sqrt(5), generator=generator)
        case "kaiming_normal" | "kaiming_uniform":
            draw_ = getattr(nn.init, scheme + "_")
            draw_(buffer, a=a, mode=mode, nonlinearity="leaky_relu", generator=generator)
        case _:
            getattr(nn.init, scheme + "_")(buffer, generator=generator)
    with torch.no_grad():
        weight.copy_(buffer)
