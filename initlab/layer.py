"""What a layer puts out at init: predicted in closed form, and measured over many draws.

The weights w have mean 0 and variance V, the bias b mean 0 and variance U. The data enter through
their patches p, the n = fan_in numbers that one output is computed from, y = w . p + b: by the
mean patch mu, the second moments M = mean of p p^T, and the sizes |p|.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from initlab.init import (
    Activation,
    Mode,
    Scheme,
    as_generator,
    fans,
    gain,
    known,
    layers_to_draw,
    redraw_,
    weight_rule,
)
from initlab.moments import Drawn, Predicted

PAIRS_FROM = 768  # patches from which the sums over pairs of patches are estimated
UNIFORM = -6 / 5  # excess kurtosis, E[w^4] / V^2 - 3, of a uniform distribution
BLOCK = 2**20  # outputs computed at a time, and weights held at a time: 4 MB in float32
# E[y], E[|y|], E[y^2], E[y|y|] to half-moments: y+ = (y + |y|) / 2, y+^2 = (y^2 + y|y|) / 2 ...
TO_HALVES = torch.tensor([[1, 1, 0, 0], [1, -1, 0, 0], [0, 0, 1, 1], [0, 0, 1, -1]]).double() / 2


def predict(
    x: Tensor,
    layer: nn.Conv2d | nn.Linear,
    scheme: Scheme,
    a: float | Activation = 0.0,
    bias: Literal["default", "zeros"] = "default",
    *,
    mode: Mode = "fan_in",
) -> Predicted:
    """Predict the moments of `layer(x)` over all weights that `scheme` may draw, without drawing.

    Exact for any data: E[y], E[y^2] and E[leaky(y)^2]; the sd of the mean and of the mean square
    of y. Exact for Gaussian w and b: E[leaky(y)]; for uniform ones it comes out low, by 0.5 % on
    MNIST's 5x5 patches and by 8 % at fan_in = 1. The sd's after an activation come from the pairs
    of 768 patches spread evenly over the data (within 1 % of 4,096 on MNIST), of 768 / sqrt(groups)
    in each group. For uniform w and b they hold the leading term of the kurtosis: measured, within
    3 % at fan_in = 25, 7 % at 5, and rough below. Those of std and rms are first-order: sd(r) =
    sd(r^2) / (2 r). The work is done on the CPU; memory grows with fan_in squared.

    Args:
        x: Batch of shape (N, C, H, W) for a Conv2d, (N, in_features) for a Linear.
        layer: Its shape, stride, zero padding, dilation, groups and whether it has a bias are
            used, its values are not.
        scheme: As in `initialize_`, except "orthogonal", whose weights are not independent.
        a: Slope or activation that the Kaiming schemes assume.
        bias: "default" is U(-1/sqrt(fan_in), 1/sqrt(fan_in)), "zeros" none.
        mode: As in `initialize_`, for the Kaiming schemes.

    Raises:
        ValueError: Unknown scheme, bias or mode; `a` not finite or without a gain; `x` empty, not
            finite, of another number of channels or smaller than the kernel; padding by anything
            but zeros; a lazy layer.
        TypeError: `layer` is neither Conv2d nor Linear; `x` is no floating-point tensor.

    Source: He et al. 2015, arXiv 1502.01852, sec. 2.2, without its assumptions on the data; for
    pairs of patches the arc-cosine kernels of Cho & Saul 2009.

    Example:
        White noise of unit energy keeps its rms under gain 1, plus the bias: sqrt(1 + 1/75).

        >>> x = torch.randn(100, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        >>> conv = nn.Conv2d(1, 32, 5)
        >>> predicted = predict(x / x.square().mean().sqrt(), conv, "kaiming_normal", a=1.0)
        >>> round(predicted.at().rms, 2), round(predicted.at(0.0).mean, 2)
        (1.01, 0.4)
    """
    x = _check(x, layer, bias)
    plain = _unset(layer)
    n, groups = fans(plain.weight)[0], getattr(layer, "groups", 1)
    V, uniform = _weight_variance(plain.weight, scheme, a, mode)
    B = 1 / math.sqrt(n) if plain.bias is not None and bias == "default" else 0.0
    U = B**2 / 3
    cumulants = UNIFORM * V**2 if uniform else 0.0, UNIFORM * U**2
    pairs_from = math.ceil(PAIRS_FROM / math.sqrt(groups))  # as many pairs for any groups
    parts = [_of_a_group(part, layer, V, U, cumulants, pairs_from) for part in x.chunk(groups, 1)]
    expected, per_filter = (torch.stack(values).mean(0) for values in zip(*parts, strict=True))
    covariance = TO_HALVES @ (per_filter / len(plain.weight)) @ TO_HALVES.T
    count = _positions(x, layer) * len(plain.weight)
    return Predicted(TO_HALVES @ expected, covariance, count, uniform)


def draw(
    x: Tensor,
    layer: nn.Conv2d | nn.Linear,
    scheme: Scheme,
    a: float | Activation = 0.0,
    bias: Literal["default", "zeros"] = "default",
    n: int = 1000,
    generator: Generator | int | None = None,
    *,
    mode: Mode = "fan_in",
) -> Drawn:
    """Initialise `layer` anew `n` times and measure `layer(x)` each time, for every slope at once.

    A draw is what `initialize_(layer, scheme, a, mode, bias, generator)` makes of a layer like
    this; `layer` itself is left as it is. Memory does not grow with `n`, but for the result. The
    work is done on the CPU.

    Args:
        x: Batch of shape (N, C, H, W) for a Conv2d, (N, in_features) for a Linear.
        layer: The layer; zero padding only.
        scheme: As in `initialize_`.
        a: Slope or activation that the Kaiming schemes assume.
        bias: "default" draws it anew each time, "zeros" leaves it out.
        n: Number of draws.
        generator: Source of the random numbers, or the seed of a new one; by default torch's
            global one.
        mode: As in `initialize_`, for the Kaiming schemes.

    Raises:
        ValueError: `n` < 1; else as `predict` raises it.
        TypeError: As `predict` raises it.

    Example:
        >>> x = torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(0))
        >>> conv = nn.Conv2d(1, 4, 3)
        >>> drawn = draw(x, conv, "default", n=500, generator=0)
        >>> predict(x, conv, "default").at(0.0).covers(drawn.at(0.0)), drawn.each().rms.shape
        (True, torch.Size([500]))
    """
    if n < 1:
        raise ValueError(f"the number of draws n must be 1 or more, got {n}")
    x = _check(x, layer, bias)
    plain, draw_ = _unset(layer), weight_rule(scheme, a, mode)
    layers_to_draw(plain, scheme)
    generator = as_generator(generator)
    filters, groups = len(plain.weight), getattr(layer, "groups", 1)
    count = _positions(x, layer) * filters
    at_once = max(1, min(n, 128, BLOCK // max(filters, plain.weight.numel())))
    columns = max(1, BLOCK // (at_once * filters))
    # One buffer for all outputs: fresh memory for each costs as much time as computing them
    buffer = x.new_empty(at_once * filters * columns)
    halves = torch.empty(n, 4, dtype=torch.float64)
    # A bar only for what takes longer than two seconds
    with torch.no_grad(), tqdm(total=n, desc=f"draw {scheme}", unit="draw", delay=2) as bar:
        for rows in halves.split(at_once):
            k, weights = len(rows), []
            for _ in range(k):
                redraw_(plain, draw_, bias, generator)
                shift = torch.zeros(filters) if plain.bias is None else plain.bias
                weights.append(torch.cat([plain.weight.flatten(1), shift[:, None]], 1))
            weight = _by_group(weights, groups).to(x.dtype)
            sums = torch.zeros(4, k, dtype=torch.float64)
            for block in patches(x, layer):
                block, repeats = _first_once(block)
                # A row of ones takes the bias: adding it by itself costs a pass over the outputs
                block = F.pad(block.unflatten(0, (groups, -1)), (0, 0, 0, 1), value=1.0)
                if repeats:
                    sums += repeats * _half_sums((weight @ block[..., :1]).unflatten(1, (k, -1)))
                for p in block.split(columns, 2):
                    y = buffer[: k * filters * p.shape[2]].view(groups, -1, p.shape[2])
                    torch.bmm(weight, p, out=y)
                    sums += _half_sums(y.view(groups, k, -1, p.shape[2]))
            rows.copy_(sums.T / count)
            bar.update(k)
    return Drawn(halves, count)


def patches(x: Tensor, layer: nn.Conv2d | nn.Linear) -> Iterator[Tensor]:
    """Yield the patches of x, already padded, as blocks (channels * kernel, some) of about 16 MB.

    A column is what one position of one picture is computed from, channel by channel, so that the
    rows of a group stand together. A Linear takes each row of x (N, in_features) whole.
    """
    if isinstance(layer, nn.Linear):
        yield from (part.T for part in x.split(max(1, 2**22 // x.shape[1])))
        return
    a_picture = x.shape[1] * math.prod(layer.kernel_size) * _positions(x[:1], layer)
    for part in x.split(max(1, 2**22 // a_picture)):
        columns = F.unfold(part, layer.kernel_size, layer.dilation, stride=layer.stride)
        yield columns.transpose(0, 1).flatten(1)


def _positions(x: Tensor, layer: nn.Conv2d | nn.Linear) -> int:
    """Return the number of patches of the padded batch x, over all pictures."""
    if isinstance(layer, nn.Linear):
        return len(x)
    spans = zip(x.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)
    return len(x) * math.prod((size - d * (k - 1) - 1) // s + 1 for size, k, s, d in spans)


def _check(x: Tensor, layer: nn.Module, bias: str) -> Tensor:
    """Raise if the arguments do not fit; return x zero-padded, on the CPU, in float32 or 64."""
    known("bias", bias, ("default", "zeros"))
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise TypeError(f"needs a Conv2d or a Linear, got {type(layer).__name__}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x))}")
    if any(is_lazy(parameter) for parameter in layer.parameters()):
        raise ValueError(f"{layer} has no shape before its first input; run it once")
    if isinstance(layer, nn.Linear):
        channels, dims = layer.in_features, 2
        expected = f"(N, {channels}), by x.flatten(0, -2) from more dimensions,"
    else:
        if layer.padding_mode != "zeros":
            raise ValueError(f"only zero padding is covered, got {layer.padding_mode!r}")
        channels, dims = layer.in_channels, 4
        expected = f"(N, {channels}, H, W)"
    if x.dim() != dims or x.shape[1] != channels or x.numel() == 0:
        raise ValueError(f"x must have shape {expected} and not be empty, got {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("x has values that are nan or infinite")
    if isinstance(layer, nn.Conv2d):
        x = F.pad(x, _sides(layer))
        kernel, size = layer.kernel_size, tuple(x.shape[2:])
        if any(d * (k - 1) >= s for d, k, s in zip(layer.dilation, kernel, size, strict=True)):
            raise ValueError(f"the kernel {kernel} is larger than the padded picture {size}")
    # Half precision cannot hold the sums
    return x.detach().to("cpu", torch.promote_types(x.dtype, torch.float32))


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


def _unset(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """Return a layer on the CPU with weights and bias of the same shapes, and no values yet."""
    # The type of any parameter: to read a parametrised weight computes it, and may change the layer
    options = {"bias": layer.bias is not None, "dtype": next(layer.parameters()).dtype}
    if isinstance(layer, nn.Linear):
        return nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features, **options)
    shape = layer.in_channels, layer.out_channels, layer.kernel_size
    return nn.utils.skip_init(nn.Conv2d, *shape, groups=layer.groups, **options)


def _weight_variance(
    weight: Tensor, scheme: Scheme, a: float | Activation, mode: Mode
) -> tuple[float, bool]:
    """Return the variance V of one weight, and whether it is uniform."""
    fan_in, fan_out = fans(weight)
    known("mode", mode, ("fan_in", "fan_out"))
    kaiming = gain(a) ** 2 / (fan_in if mode == "fan_in" else fan_out)
    variances = {
        "default": gain(math.sqrt(5)) ** 2 / fan_in,
        "kaiming_normal": kaiming,
        "kaiming_uniform": kaiming,
        "xavier_normal": 2 / (fan_in + fan_out),
        "xavier_uniform": 2 / (fan_in + fan_out),
    }
    if scheme not in variances:
        raise ValueError(f"no prediction for scheme {scheme!r}; known are {', '.join(variances)}")
    return variances[scheme], not scheme.endswith("normal")


def _of_a_group(
    x: Tensor,
    layer: nn.Conv2d | nn.Linear,
    V: float,
    U: float,
    cumulants: tuple[float, float],
    pairs_from: int,
) -> tuple[Tensor, Tensor]:
    """Return E of y, |y|, y^2, y|y|, and the covariance (4, 4) of their means over one filter."""
    positions = _positions(x, layer)
    chosen = _spread_evenly(pairs_from, positions)
    M, mu, size, count, sample = 0.0, 0.0, 0.0, 0, []
    for p in patches(x, layer):
        p = p.double()
        M, mu = M + p @ p.T, mu + p.sum(1)
        size += (V * p.square().sum(0) + U).sqrt().sum().item()
        here = (chosen >= count) & (chosen < count + p.shape[1])
        sample.append(p[:, chosen[here] - count])
        count += p.shape[1]
    M, mu = M / count, mu / count

    mu2, power = mu.square().sum().item(), V * M.trace().item() + U
    gaussian = 2 * V**2 * M.square().sum().item() + 4 * U * V * mu2 + 2 * U**2
    w_cumulant, b_cumulant = cumulants
    covariance = _pair_covariance(
        torch.cat(sample, 1), positions, V, U, w_cumulant, b_cumulant, gaussian
    )
    covariance[0, 0] = V * mu2 + U
    covariance[2, 2] = gaussian + w_cumulant * M.diagonal().square().sum() + b_cumulant
    mean_abs = math.sqrt(2 / math.pi) * size / count
    return torch.tensor([0.0, mean_abs, power, 0.0], dtype=torch.float64), covariance


def _spread_evenly(some: int, of: int) -> Tensor:
    """Return about `some` of the numbers below `of`, or all of them, sorted.

    By multiples of the golden ratio: evenly, and in step with neither row nor picture.
    """
    if of <= some:
        return torch.arange(of)
    golden = (math.sqrt(5) - 1) / 2
    return (torch.arange(some).double() * golden).frac().mul(of).long().unique()


def _pair_covariance(
    p: Tensor,
    positions: int,
    V: float,
    U: float,
    w_cumulant: float,
    b_cumulant: float,
    var_square: float,
) -> Tensor:
    """Return the covariance (4, 4) of one filter's means of y, |y|, y^2, y|y| over all patches.

    From some of the patches, p of shape (n, k), and from the exact variance of the mean of y^2 for
    Gaussian w and b. Two outputs y, y' have standard deviations s, s', correlation r and, where w
    or b is not Gaussian, the joint cumulant c = sum_i c_w p_i^2 p'_i^2 + c_b. What is averaged
    over all pairs is, exact for c = 0 and else with the leading term of c, which acts through the
    second Hermite polynomials of y / s and y' / s',
        Cov(|y|, |y'|)     = s s' 2/pi (sqrt(1 - r^2) + r asin r - 1) + c / (2 pi s s')
        Cov(y^2, |y'|)     = s^2 s' sqrt(2/pi) r^2 + c / (sqrt(2 pi) s')
        Cov(y|y|, y'|y'|)  = s^2 s'^2 2/pi (3 r sqrt(1 - r^2) + (1 + 2 r^2) asin r)
        Cov(y|y|, y')      = s^2 s' sqrt(2/pi) 2 r
    Odd functions of (w, b) do not covary with even ones.
    """
    k = p.shape[1]
    root = math.sqrt(2 / math.pi)
    K = V * (p.T @ p) + U
    s = K.diagonal().sqrt()
    ss = s.outer(s)
    r = (K / ss.clamp_min(1e-300)).clamp(-1, 1)
    root_1_r2, asin = (1 - r * r).sqrt(), r.asin()
    square_by_abs = s.square().outer(s)
    c = w_cumulant * (p.T.square() @ p.square()) + b_cumulant

    def mean(pairs: Tensor) -> float:
        """Mean over all pairs of the data, of which a share 1/positions is one patch twice."""
        same = pairs.diagonal().mean().item()
        others = (pairs.mean().item() - same / k) / (1 - 1 / k) if k > 1 else same
        return same / positions + others * (1 - 1 / positions)

    # Few patches have a little more or less energy than all: scale by what is known of all
    energy = (var_square / max(mean(2 * K * K), 1e-300)) ** 0.25
    covariance = torch.zeros(4, 4, dtype=torch.float64)
    covariance[1, 1] = energy**2 * mean(
        ss * 2 / math.pi * (root_1_r2 + r * asin - 1) + c / ss.clamp_min(1e-300) / (2 * math.pi)
    )
    covariance[3, 3] = energy**4 * mean(
        ss**2 * 2 / math.pi * (3 * r * root_1_r2 + (1 + 2 * r * r) * asin)
    )
    covariance[1, 2] = covariance[2, 1] = energy**3 * mean(
        square_by_abs * root * r * r + c / s.clamp_min(1e-300) * root / 2
    )
    covariance[0, 3] = covariance[3, 0] = energy**3 * mean(square_by_abs * root * 2 * r)
    return covariance


def _by_group(draws: list[Tensor], groups: int) -> Tensor:
    """Make k draws (out_channels, ...) one wide layer (groups, k * out_channels / groups, ...)."""
    return torch.stack(draws).unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2)


def _first_once(block: Tensor) -> tuple[Tensor, int]:
    """Return patches (n, some) without those that repeat the first, and the number of these.

    Nearly half of MNIST's 5x5 patches are one: black only.
    """
    repeated = (block == block[:, :1]).all(0)
    repeated[0] = False
    number = int(repeated.sum())
    return (block[:, ~repeated] if number else block), number


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
