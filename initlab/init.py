"""Kaiming's rule in a formula or two, and torch's initialisers applied to a whole network."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

Scheme = Literal[
    "default", "kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform", "orthogonal"
]
Mode = Literal["fan_in", "fan_out"]
Bias = Literal["keep", "zeros", "default"]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLUTIONS += (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Activation = Callable[[Tensor], Tensor]
Module = TypeVar("Module", bound=nn.Module)


def gain(a: float | Activation) -> float:
    """Return the gain that keeps the mean square: sqrt(2 / (1 + a^2)) for a leaky ReLU of slope a.

    The standard deviation 1/sqrt(fan_in) is multiplied by it: by sqrt(2) for a ReLU (a = 0), by 1
    for no activation (a = 1), by 1/sqrt(3) for a = sqrt(5). For any other activation f, given as a
    function or module, it is 1 / sqrt(E f(z)^2) with z ~ N(0, 1), by quadrature to 1e-8.

    Source: He et al. 2015, arXiv 1502.01852, eq. 15 (there as a condition on the variance).

    Raises:
        ValueError: `a` is nan or infinite; E f(z)^2 is 0 or not finite; f is not elementwise.

    Example:
        >>> gain(1.0), round(gain(0.0) ** 2, 6), round(gain(5**0.5) ** 2, 6)
        (1.0, 2.0, 0.333333)
        >>> print(f"{gain(torch.relu):.4f} {gain(nn.GELU()):.4f}")
        1.4142 1.5335
    """
    if callable(a):
        return 1 / math.sqrt(_mean_square(a))
    if not math.isfinite(a):
        raise ValueError(f"the slope a must be finite, got {a}")
    return math.sqrt(2.0 / (1.0 + a**2))


def _mean_square(activation: Activation) -> float:
    """Return E f(z)^2 for z ~ N(0, 1), by Gauss's rule on intervals, halved where it is not exact.

    The halving finds kinks and jumps: the error of an interval that holds one shrinks with it.
    """
    f = activation
    if isinstance(f, nn.Module):
        f = copy.deepcopy(f).cpu().double()
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(16))

    def integrals(left: Tensor, width: float) -> Tensor:
        z = (left[:, None] + width / 2 * (nodes + 1)).flatten()
        y, again = f(z.clone()), f(z[:8].clone())
        if y.shape != z.shape or not torch.allclose(again, y[:8], 1e-9, 0, equal_nan=True):
            raise ValueError(f"{activation} is not elementwise, or is random: it has no gain")
        density = (-z * z / 2).exp() / math.sqrt(2 * math.pi)
        return (y.square() * density).view(-1, len(nodes)) @ weights * width / 2

    with torch.no_grad():
        left, width, total = torch.from_numpy(np.arange(-38.0, 38.0)), 1.0, 0.0
        whole = integrals(left, width)
        tails = whole[[0, -1]].sum()  # beyond is less, unless f^2 outgrows the density
        while len(left) and width > 2**-50:
            width /= 2
            left = torch.stack([left, left + width], 1).flatten()
            halves = integrals(left, width).view(-1, 2)
            off = (halves.sum(1) - whole).abs() > 1e-13 * (total + halves.sum())
            total += halves[~off].sum().item()
            left, whole = left.view(-1, 2)[off].flatten(), halves[off].flatten()
    if not 0 < total < math.inf or max(tails, whole.sum()) > 1e-10 * total:
        what = "0" if total == 0 else "not finite"
        raise ValueError(f"E f(z)^2 of {activation} is {what}: it has no gain")
    return total


def fans(weight: Tensor) -> tuple[int, int]:
    """Return (fan_in, fan_out) of a weight of shape (out_channels, in_channels / groups, *kernel).

    fan_in counts the products that are summed into one output, fan_out the outputs that one input
    goes into, both as torch counts them: stride, padding and the number of groups are left out.

    Raises:
        ValueError: `weight` has fewer than 2 dimensions.

    Example:
        >>> fans(nn.Conv2d(1, 32, 5).weight)
        (25, 800)
    """
    if weight.dim() < 2:
        raise ValueError(f"fans need a weight of 2 or more dimensions, got {tuple(weight.shape)}")
    n_out, n_in, *kernel = weight.shape
    return n_in * math.prod(kernel), n_out * math.prod(kernel)


def initialize_(
    module: Module,
    scheme: Scheme,
    a: float | Activation | None = None,
    mode: Mode = "fan_in",
    bias: Bias = "keep",
    generator: Generator | int | None = None,
    *,
    gain: float | None = None,
) -> Module:
    """Draw the weight of every Linear and (transposed) convolution anew, in place; return `module`.

    Layers are visited in the order of `module.modules()`, the weight before the bias. The drawing
    is done by `torch.nn.init`: the same generator state gives the same bits.

    Args:
        module: A layer or a network. What belongs to layers of other kinds is kept (normalisation,
            embedding, recurrent; of an attention the `in_proj_weight`, its output is a Linear),
            unless it is shared with one of these.
        scheme: "default" is what `reset_parameters` does to a weight, U(-1/sqrt(fan_in),
            1/sqrt(fan_in)); the others are the initialisers of torch of that name.
        a: Slope that the two Kaiming schemes assume, or the activation itself, such as `F.gelu`;
            by default a ReLU.
        mode: "fan_in" or "fan_out", for the two Kaiming schemes.
        bias: "keep" leaves biases alone, as every `torch.nn.init.kaiming_*_` does, "zeros" clears
            them, "default" draws them as `reset_parameters` does.
        generator: Source of the random numbers, or the seed of a new one; by default torch's
            global one.
        gain: Factor of the weights of "xavier" and "orthogonal", by default 1; the activation's is
            `gain(f)`.

    Raises:
        ValueError: Unknown `scheme`, `mode` or `bias`; an `a` or `gain` that the scheme does not
            take, or that is not finite; nothing to initialise; a weight that has no shape yet
            (lazy), no memory (meta) or is computed from others (weight norm); "orthogonal" in half
            precision, which torch cannot factorise. Nothing is changed then.

    Source: He et al. 2015, arXiv 1502.01852; Glorot & Bengio 2010; Saxe et al. 2013, arXiv
    1312.6120.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 64, 5), nn.ReLU(), nn.Conv2d(64, 64, 5))
        >>> net = initialize_(net, "kaiming_normal", a=0.0, bias="zeros", generator=0)
        >>> print(f"{net[2].weight.std() * fans(net[2].weight)[0] ** 0.5:.1f}, {gain(0.0):.1f}")
        1.4, 1.4
    """
    check_known("bias", bias, get_args(Bias))
    draw_ = weight_rule(scheme, a, mode, gain)
    layers = layers_to_draw(module, scheme)
    generator = as_generator(generator, layers[0].weight.device)
    for layer in layers:
        redraw_(layer, draw_, bias, generator)
    return module


def check_known(name: str, value: str, values: tuple[str, ...]) -> None:
    """Raise a ValueError that lists the known `values` if `value` is none of them."""
    if value not in values:
        raise ValueError(f"unknown {name} {value!r}; known are {', '.join(values)}")


def as_generator(
    generator: Generator | int | None, device: torch.device | str = "cpu"
) -> Generator | None:
    """Return a new generator seeded with an int; anything else as it is."""
    if isinstance(generator, int):
        return Generator(device).manual_seed(generator)
    return generator


def weight_rule(
    scheme: Scheme, a: float | Activation | None, mode: Mode, factor: float | None
) -> Callable[..., Tensor]:
    """Return the initialiser of torch, to be called with a weight and `generator=`."""
    check_known("scheme", scheme, get_args(Scheme))
    check_known("mode", mode, get_args(Mode))
    takes = scheme.partition("_")[0]
    if a is not None and takes != "kaiming":
        raise ValueError(f"the scheme {scheme!r} assumes no slope: leave out a = {a}")
    if factor is not None and takes not in ("xavier", "orthogonal"):
        raise ValueError(f"the scheme {scheme!r} has its own gain: leave out gain = {factor}")
    if factor is not None and not 0 < factor < math.inf:
        raise ValueError(f"the gain must be positive and finite, got {factor}")
    if takes == "default":
        return partial(nn.init.kaiming_uniform_, a=math.sqrt(5))
    draw_ = getattr(nn.init, scheme + "_")
    if takes != "kaiming":
        return partial(draw_, gain=1.0 if factor is None else factor)
    a = 0.0 if a is None else a
    size = gain(a)
    if not callable(a):
        return partial(draw_, a=a, mode=mode, nonlinearity="leaky_relu")

    # No slope has a gain above sqrt(2), so torch's rule is written out
    def draw_by_gain_(weight: Tensor, generator: Generator | None = None) -> Tensor:
        std = size / math.sqrt(fans(weight)[mode == "fan_out"])
        if scheme == "kaiming_normal":
            return nn.init.normal_(weight, 0, std, generator=generator)
        bound = math.sqrt(3) * std
        return nn.init.uniform_(weight, -bound, bound, generator=generator)

    return draw_by_gain_


def layers_to_draw(module: nn.Module, scheme: Scheme) -> list[nn.Module]:
    """Return the Linear and convolution layers of `module`, or raise if one cannot be drawn."""
    layers = [m for m in module.modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS))]
    if not layers:
        raise ValueError(f"{type(module).__name__} holds no Linear or convolution to initialise")
    for layer in layers:
        # In this order: to read a parametrised weight computes it, which may change the layer
        if is_parametrized(layer, "weight") or not isinstance(layer.weight, nn.Parameter):
            raise ValueError(f"the weight of {layer} is computed (parametrised): nothing to draw")
        if is_lazy(layer.weight):
            raise ValueError(f"{layer} has no shape before its first input; run the network once")
        if layer.weight.is_meta:
            raise ValueError(f"{layer} is on the meta device: it has no memory to draw into")
        if scheme == "orthogonal" and layer.weight.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f'"orthogonal" needs float32 or float64, got {layer.weight.dtype}')
    return layers


def redraw_(
    layer: nn.Module, draw_: Callable[..., Tensor], bias: Bias, generator: Generator | None
) -> None:
    """Draw one layer, its weight through a contiguous buffer, as reset_parameters: any layout."""
    weight = layer.weight
    buffer = torch.empty_like(weight, memory_format=torch.contiguous_format, requires_grad=False)
    draw_(buffer, generator=generator)
    with torch.no_grad():
        weight.copy_(buffer)
    if layer.bias is not None and bias == "zeros":
        nn.init.zeros_(layer.bias)
    elif layer.bias is not None and bias == "default":
        fan_in, _ = fans(weight)
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
