"""What a layer puts out at init: predicted in closed form.

The weights w have mean 0 and variance V, the bias b mean 0 and variance U. The data enter through
their patches p, the fan_in numbers that one output y = w . p + b is computed from.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from initlab.init import Activation, Scheme, fans, scale_rule
from initlab.moments import Predicted
from initlab.patches import patches_of, windows_of

PAIRS_FROM = 768  # patches from which the sums over pairs of patches are estimated
KURTOSIS, SIXTH = -6 / 5, 48 / 7  # fourth and sixth cumulant of a uniform number of variance 1
ROOT = math.sqrt(2 / math.pi)
# E[y], E[|y|], E[y^2], E[y|y|] to half-moments: y+ = (y + |y|) / 2, y+^2 = (y^2 + y|y|) / 2 ...
TO_HALVES = ((1, 1, 0, 0), (1, -1, 0, 0), (0, 0, 1, 1), (0, 0, 1, -1))


def predict(
    x: Tensor,
    layer: nn.Conv2d | nn.Linear,
    scheme: Scheme,
    a: float | Activation | None = None,
    bias: Literal["default", "zeros"] = "default",
) -> Predicted:
    """Predict the moments of `layer(x)` over all weights that `scheme` may draw, without drawing.

    Exact for any data: E[y], E[y^2] and E[leaky(y)^2]; the sd of the mean and of the mean square
    of y; E[leaky(y)] of normal weights. That of uniform ones holds the leading term of what makes
    them other than normal; so do the sd's after an activation, for which some sums over pairs are
    estimated from 768 patches. Those of std and rms take the mean square of a draw for a shifted
    gamma number (data/predict has all this against draws). Source: He et al. 2015, sec. 2.2,
    without its assumptions on the data; for pairs the arc-cosine kernels of Cho & Saul 2009.

    `x` is a batch (N, C, H, W) for a Conv2d, (N, in_features) for a Linear; the values of `layer`
    do not matter. `scheme`, but for "orthogonal", and `a` are as in `initialize_`; a `bias` is
    U(±1/sqrt(fan_in)), or none. Memory grows with fan_in squared.

    Raises a TypeError if `layer` is neither Conv2d nor Linear or `x` no floating-point tensor; a
    ValueError as `initialize_`, if `x` is empty, not finite or not as the layer takes it, or if the
    layer is lazy, pads by anything but zeros or computes in a way of its own.

    >>> x = torch.randn(100, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    >>> round(predict(x, nn.Conv2d(1, 32, 5), "kaiming_normal", a=1.0).at().rms, 2)
    1.01
    """
    windows, positions, conv = windows_of(x, layer, bias)
    V = scale_rule(scheme, a)(conv.weight) ** 2
    if scheme == "orthogonal":
        raise ValueError("no prediction for scheme 'orthogonal': its weights are not independent")
    U = 1 / (3 * fans(conv.weight)[0]) if conv.bias is not None else 0.0
    some = math.ceil(PAIRS_FROM / math.sqrt(conv.groups))  # as many pairs for any groups
    bounded = not scheme.endswith("normal")
    parts = [_of_a_group(x, positions, V, U, bounded, some) for x in windows.chunk(conv.groups, 1)]
    expected, per_filter, others = (torch.stack(v).mean(0) for v in zip(*parts, strict=True))
    power, square, cube, cumulant = others.tolist()
    to_halves = expected.new_tensor(TO_HALVES) / 2
    return Predicted(
        to_halves @ expected,
        to_halves @ (per_filter / conv.out_channels) @ to_halves.T,
        count=positions * conv.out_channels,
        skew=power * cube / square**2 if square else 1.0,
        parts=KURTOSIS * power / cumulant if cumulant else math.inf,
    )


def _of_a_group(
    windows: Tensor, positions: int, V: float, U: float, bounded: bool, some: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return E of y, |y|, y^2, y|y|, the covariance (4, 4) of their means over one filter, others.

    With weights and bias of variance 1, y = w . P of the patch P = (sqrt(V) p, sqrt(U)). Others:
    the traces of M, M^2, M^3, M the mean of P P^T; of y the mean fourth cumulant over its variance.
    """
    uniform = torch.tensor([bounded] * windows[0, :, 0, 0].numel() + [True], device="cpu")

    def scaled(p: Tensor) -> Tensor:
        return F.pad(math.sqrt(V) * p.double(), (0, 0, 0, 1), value=math.sqrt(U))

    M, N, vectors, patches = 0.0, 0.0, 0.0, []
    for P in map(scaled, patches_of(windows)):
        squares = P.square()
        variance = squares.sum(0)
        s = variance.sqrt().clamp_min(1e-70)
        cumulant = KURTOSIS * squares[uniform].square().sum(0)
        bent = s * P * (2 - cumulant / (12 * s**4)) + KURTOSIS / 3 * uniform[:, None] * P**3 / s
        M, N = M + P @ P.T / positions, N + P / s @ P.T / positions
        vectors = vectors + torch.stack([P.sum(1), (s * P).sum(1), bent.sum(1)]) / positions
        patches.append((variance, cumulant, 3 * squares[uniform].amax(0)))
    variance, cumulant, widest = (torch.cat(values) for values in zip(*patches, strict=True))
    mean, by_size, bent = vectors

    number, often = _sample(variance.sqrt(), some)
    picture, row, column = torch.unravel_index(number, (len(windows), *windows.shape[2:4]))
    sample = scaled(windows[picture, :, row, column].flatten(1).T)
    others = variance.sqrt().sum() ** 2 - variance.sum()
    rest = _rest_of_pairs(sample, often, uniform, others / positions**2, positions)
    m, k = M.diagonal() * uniform, N.diagonal() * uniform
    covariance = mean.new_zeros(4, 4)  # odd functions of (w, b) do not covary with even ones
    covariance[0, 0] = mean @ mean
    covariance[1, 1] = 2 / math.pi * ((N * N).sum() / 2 + KURTOSIS / 4 * k @ k + rest[0])
    covariance[2, 2] = 2 * (M * M).sum() + KURTOSIS * m @ m
    covariance[3, 3] = 2 / math.pi * (4 * by_size @ by_size + rest[2])
    covariance[1, 2] = covariance[2, 1] = ROOT * ((M * N).sum() + KURTOSIS / 2 * m @ k + rest[1])
    covariance[0, 3] = covariance[3, 0] = ROOT * bent @ mean
    traces = [M.trace(), (M * M).sum(), (M @ M * M).sum()]
    part = (cumulant / variance.clamp_min(1e-200)).mean()
    expected = mean.new_tensor([0.0, _mean_abs(variance, cumulant, widest).mean(), M.trace(), 0.0])
    return expected, covariance, torch.stack([*traces, part])


def _mean_abs(variance: Tensor, cumulant: Tensor, widest: Tensor) -> Tensor:
    """Return E|y| of sums y of independent parts, by their variance and fourth cumulant.

    The widest uniform part, on [-h, h] with h^2 = `widest`, is taken as it is, the others, of sd t,
    as Gaussian but for the leading term of their fourth cumulant: by q = h / t, phi of N(0, 1),
        E|y| = t ((q + 1/q) / 2 erf(q / sqrt(2)) + phi(q)) - cumulant / (12 t^3) phi(q).
    """
    t = (variance - widest / 3).clamp_min(1e-18 * widest + 1e-190).sqrt()
    q = (widest.sqrt() / t).clamp_min(1e-6)
    phi = (-q * q / 2).exp() / math.sqrt(2 * math.pi)
    rest = cumulant - KURTOSIS * (widest / 3) ** 2
    sizes = t * ((q + 1 / q) / 2 * torch.erf(q / math.sqrt(2)) + phi) - rest / (12 * t**3) * phi
    return sizes.where(variance > 0, 0.0)


def _sample(size: Tensor, some: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of about `some` patches or of all, and how many each stands for.

    The larger, the likelier; by multiples of the golden ratio, in step with no row or picture.
    """
    size = size.clamp_min(1e-70)
    if len(size) <= some:
        return torch.arange(len(size), device=size.device), torch.ones_like(size)
    share = some / 2 * (size / size.mean() + size.square() / size.square().mean()) / len(size)
    for _ in range(20):  # until the shares below 1 add up to what those above leave
        sure = share >= 1
        share = torch.where(sure, 1.0, share * (some - sure.sum()) / share[~sure].sum())
    steps = torch.where(sure, 0.0, share).cumsum(0)
    strata = torch.arange(round(steps[-1].item()), device=size.device).double()
    points = strata + (strata * (math.sqrt(5) - 1) / 2).frac()
    picked = torch.searchsorted(steps, points, right=True).clamp_max(len(size) - 1)
    counts = torch.bincount(picked, minlength=len(size)) + sure
    number = counts.nonzero().flatten()
    return number, counts[number] / share[number]


def _rest_of_pairs(
    P: Tensor, often: Tensor, uniform: Tensor, others: float, positions: int
) -> list[float]:
    """Return what pairs of patches, from a sample, add to what sums over all patches tell exactly.

    Two outputs y, y' of one filter have standard deviations s, s', correlation r and, as w and b
    are not Gaussian, the cumulants k22 = KURTOSIS sum P_i^2 P'_i^2 / (s^2 s'^2), k31, k40 and k42
    likewise, the sums over the uniform ones. With w = sqrt(1 - r^2),
        Cov(|y|, |y'|) = 2/pi s s' (w + r asin r - 1 + k40 (r^2/w - w + 1) / 12 - k31 r/w / 3
                         + k22/w / 4 + w (k22^2 / 32 + k22 k40 / 16 - k42 / 24))
        Cov(y^2, |y'|) = sqrt(2/pi) s^2 s' (r^2 + k22 / 2 - k13 r / 3 + k04 r^2 / 8
                         + w (k22 k04 / 16 - k24 / 24))
        Cov(y|y|, y'|y'|) = 2/pi s^2 s'^2 (3 r w + (1 + 2 r^2) asin r + k22 asin r + 4/3 w k31
                            - r w k40 / 3)
        Cov(y|y|, y') = sqrt(2/pi) s^2 s' (2 r + k31 / 3 - k40 r / 12)
    on average over both orders of the pair. The terms in one k come from those of Gaussian w and b,
    differentiated twice by the covariances; those in two k or a sixth cumulant are those of r = 0.
    """
    s = P.square().sum(0).sqrt().clamp_min(1e-70)
    z = P / s
    r, ss = (z.T @ z).clamp(-1, 1), s.outer(s)
    w, asin = (1 - r * r).sqrt(), r.asin()
    over_w = 1 / w.clamp_min(1e-4)
    z = z[uniform]
    k22 = KURTOSIS * z.square().T @ z.square()
    k31, k42 = KURTOSIS * (z**3).T @ z, SIXTH * (z**4).T @ z.square()
    k40 = k22.diagonal()[:, None]
    pairs = often.outer(often).fill_diagonal_(0)
    scale = others / (pairs * ss).sum().clamp_min(1e-300)

    def mean(values: Tensor) -> float:  # over all pairs, of which a share 1 / positions is the same
        same = often @ values.diagonal() / positions**2
        return same.item() + (scale * (pairs * values).sum()).item()

    even = w + r * asin - 1 - r * r / 2 + k40 * (r * r * over_w - w + 1) / 12 - k31 * r * over_w / 3
    even += k22 * (over_w - 1) / 4 + w * (k22 * k22 / 32 + k22 * k40 / 16 - k42 / 24)
    mixed = w * (k22 * k40 / 16 - k42 / 24) - k31 * r / 3 + k40 * r * r / 8
    odd = 3 * r * w + (1 + 2 * r * r) * asin - 4 * r
    odd += k22 * asin + 4 / 3 * w * k31 - r * w * k40 / 3
    return [mean(ss * even), mean(ss * s * mixed), mean(ss * ss * odd)]
