"""Kaiming's rule in a formula or two, and torch's initialisers applied to a whole network."""

import copy
import math
from collections.abc import Callable
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
Scale = Callable[[Tensor], float]  # of a weight, its sd, or the gain if it is orthogonal
Module = TypeVar("Module", bound=nn.Module)


def gain(a: float | Activation) -> float:
    """Return the gain that keeps the mean square: sqrt(2 / (1 + a^2)) for a leaky ReLU of slope a.

    It multiplies the sd 1/sqrt(fan_in). Of any other activation f, a function or module, it is
    1 / sqrt(E f(z)^2) with z ~ N(0, 1), to 1e-8. Raises a ValueError if `a` or E f(z)^2 is not
    finite, or 0, or f not elementwise. Source: He et al. 2015, arXiv 1502.01852, eq. 15.

    >>> round(gain(0.0) ** 2, 6), round(gain(5**0.5) ** 2, 6), round(gain(nn.GELU()), 4)
    (2.0, 0.333333, 1.5335)
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
    is_module = isinstance(activation, nn.Module)
    f = copy.deepcopy(activation).cpu().double() if is_module else activation
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
        raise ValueError(f"E f(z)^2 of {activation} is 0 or not finite: it has no gain")
    return total


def fans(weight: Tensor) -> tuple[int, int]:
    """Return (fan_in, fan_out) of a weight of shape (out_channels, in_channels / groups, *kernel).

    Both as torch counts them: stride, padding and the number of groups are left out. Raises a
    ValueError if `weight` has fewer than 2 dimensions.

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

    In the order of `module.modules()`, the weight before the bias, to the bit as `torch.nn.init`
    draws them. Source: He et al. 2015; Glorot & Bengio 2010; Saxe et al. 2013, arXiv 1312.6120.

    Args:
        module: A layer or a network; layers of other kinds, and an `in_proj_weight`, are kept.
        scheme: "default", U(±1/sqrt(fan_in)), or the initialiser of torch of that name.
        a: Slope that the Kaiming schemes assume, or the activation itself; by default a ReLU.
        mode: "fan_in" or "fan_out", for the Kaiming schemes.
        bias: "keep" leaves biases alone, "zeros" clears them, "default" draws U(±1/sqrt(fan_in)).
        generator: Source of the random numbers, or the seed of a new one; by default torch's own.
        gain: Factor of the weights of "xavier" and "orthogonal", by default 1.

    Raises:
        ValueError: An argument is unknown, not finite or not taken by the scheme; a weight cannot
            be drawn (lazy, meta, computed from others), or there is none. Nothing is changed then.

    >>> layer = initialize_(nn.Linear(800, 64), "kaiming_normal", bias="zeros", generator=0)
    >>> f"{layer.weight.std() * 800**0.5:.2f}, {gain(0.0):.2f}"
    '1.41, 1.41'
    """
    check_known("bias", bias, get_args(Bias))
    drawer(module, scheme, scale_rule(scheme, a, mode, gain), bias, generator)()
    return module


def check_known(name: str, value: str, values: tuple[str, ...]) -> None:
    """Raise a ValueError that lists the known `values` if `value` is none of them."""
    if value not in values:
        raise ValueError(f"unknown {name} {value!r}; known are {', '.join(values)}")


def scale_rule(
    scheme: Scheme, a: float | Activation | None, mode: Mode = "fan_in", factor: float | None = None
) -> Scale:
    """Check the arguments of an initialiser, and return its scale."""
    check_known("scheme", scheme, get_args(Scheme))
    check_known("mode", mode, get_args(Mode))
    kind = scheme.partition("_")[0]
    if a is not None and kind != "kaiming":
        raise ValueError(f"the scheme {scheme!r} assumes no slope: leave out a = {a}")
    if factor is not None and kind not in ("xavier", "orthogonal"):
        raise ValueError(f"the scheme {scheme!r} has its own gain: leave out gain = {factor}")
    factor = 1.0 if factor is None else factor
    if not 0 < factor < math.inf:
        raise ValueError(f"the gain must be positive and finite, got {factor}")
    if kind == "orthogonal":
        return lambda weight: factor
    if kind == "xavier":
        return lambda weight: factor * math.sqrt(2.0 / sum(fans(weight)))
    size = gain(math.sqrt(5) if kind == "default" else 0.0 if a is None else a)
    by_fan_out = kind == "kaiming" and mode == "fan_out"
    return lambda weight: size / math.sqrt(max(fans(weight)[by_fan_out], 1))


def drawer(
    module: nn.Module, scheme: Scheme, scale: Scale, bias: Bias, generator: Generator | int | None
) -> Callable[[], None]:
    """Return what draws all layers of `module`, or raise if one cannot be drawn."""
    layers = [m for m in module.modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS))]
    if not layers:
        raise ValueError(f"{type(module).__name__} holds no Linear or convolution to initialise")
    for layer in layers:
        # In this order: to read a parametrised weight computes it, which may change the layer
        if is_parametrized(layer, "weight") or not isinstance(layer.weight, nn.Parameter):
            raise ValueError(f"the weight of {layer} is computed (parametrised): nothing to draw")
        if is_lazy(layer.weight) or layer.weight.is_meta:
            raise ValueError(f"{layer}: on the meta device, or no shape before its first input")
        if scheme == "orthogonal" and layer.weight.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f'"orthogonal" needs float32 or float64, got {layer.weight.dtype}')
    if isinstance(generator, int):
        generator = Generator(layers[0].weight.device).manual_seed(generator)

    @torch.no_grad()
    def redraw() -> None:
        """Draw as torch does, to the bit, each weight through a contiguous buffer."""
        for layer in layers:
            size = scale(layer.weight)
            buffer = torch.empty_like(layer.weight, memory_format=torch.contiguous_format)
            if scheme == "orthogonal":
                nn.init.orthogonal_(buffer, size, generator)
            elif scheme.endswith("normal"):
                buffer.normal_(0, size, generator=generator)
            else:
                buffer.uniform_(-math.sqrt(3) * size, math.sqrt(3) * size, generator=generator)
            layer.weight.copy_(buffer)
            if layer.bias is not None and bias == "zeros":
                nn.init.zeros_(layer.bias)
            elif layer.bias is not None and bias == "default":
                bound = 1 / math.sqrt(max(fans(layer.weight)[0], 1))
                nn.init.uniform_(layer.bias, -bound, bound, generator=generator)

    return redraw
