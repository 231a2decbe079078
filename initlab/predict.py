"""What a layer puts out at init, in closed form: the expectation over the weights, and its spread.

The weights w have mean 0 and variance V, the bias b mean 0 and variance U. The data enter through
their patches p, the n = fan_in numbers that one output is computed from, y = w . p + b: by the
mean patch mu, the second moments M = mean of p p^T, and the sizes |p|.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from initlab.init import Scheme, fans, gain
from initlab.moments import Predicted
from initlab.patches import as_conv, count_patches, patches

PAIRS_FROM = 768  # patches from which the sums over pairs of patches are estimated
UNIFORM = -6 / 5  # excess kurtosis, E[w^4] / V^2 - 3, of a uniform distribution


def predict(
    x: Tensor,
    conv: nn.Conv2d | nn.Linear,
    scheme: Scheme,
    a: float = 0.0,
    bias: Literal["default", "zeros"] = "default",
    *,
    mode: Literal["fan_in", "fan_out"] = "fan_in",
) -> Predicted:
    """Predict the moments of `conv(x)` over all weights that `scheme` may draw, without drawing.

    Exact for any data: E[y], E[y^2] and E[leaky(y)^2]; the sd of the mean and of the mean square
    of y. Exact for Gaussian w and b: E[leaky(y)]; for uniform ones it comes out too low, by 1 % on
    MNIST's 5x5 patches and by 8 % at fan_in = 1. The sd's after an activation come from the pairs
    of 768 patches spread evenly over the data (within 1 % of 4,096 on MNIST), of 768 / sqrt(groups)
    in each group. For uniform w and b they hold the leading term of the kurtosis: measured, within
    3 % at fan_in = 25, 7 % at 5, and rough below. Those of std and rms are first-order: sd(r) =
    sd(r^2) / (2 r). The work is done on the CPU; memory grows with fan_in squared.

    Args:
        x: Batch of shape (N, C, H, W) for a Conv2d, (N, in_features) for a Linear.
        conv: The layer; its shape, stride, zero padding, dilation, groups and whether it has a
            bias are used, its values are not.
        scheme: As in `initialize_`, except "orthogonal", whose weights are not independent.
        a: Negative slope that the Kaiming schemes assume.
        bias: "default" is U(-1/sqrt(fan_in), 1/sqrt(fan_in)), "zeros" none.
        mode: As in `initialize_`, for the Kaiming schemes.

    Raises:
        ValueError: Unknown scheme, bias or mode; `a` not finite; `x` empty, not finite, of another
            number of channels or smaller than the kernel; padding by anything but zeros; a lazy
            layer.
        TypeError: `conv` is neither Conv2d nor Linear; `x` is no floating-point tensor.

    Source: He et al. 2015, arXiv 1502.01852, sec. 2.2, without its assumptions on the data; for
    pairs of patches the arc-cosine kernels of Cho & Saul 2009.

    Example:
        White noise of unit energy keeps its rms under gain 1, plus the bias: sqrt(1 + 1/75).

        >>> import torch
        >>> from initlab import predict
        >>> x = torch.randn(100, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        >>> predicted = predict(x / x.square().mean().sqrt(), torch.nn.Conv2d(1, 32, 5),
        ...                     "kaiming_normal", a=1.0)
        >>> round(predicted.at(1.0).rms, 2), round(predicted.at(0.0).mean, 2)
        (1.01, 0.4)
    """
    x, conv = as_conv(x, conv, bias)
    V, excess_kurtosis = _weight_variance(conv.weight, scheme, a, mode)
    B = 1 / math.sqrt(fans(conv.weight)[0]) if conv.bias is not None and bias == "default" else 0.0
    U = B**2 / 3

    groups, n = conv.groups, fans(conv.weight)[0]
    M = torch.zeros(groups, n, n, dtype=torch.float64)
    mu = torch.zeros(groups, n, dtype=torch.float64)
    size, count, sample = 0.0, 0, []
    positions = count_patches(x, conv)
    sample_size = math.ceil(PAIRS_FROM / math.sqrt(groups))  # as many pairs for any groups
    chosen = torch.arange(min(sample_size, positions))
    if positions > sample_size:  # by the golden ratio: evenly, in step with neither row nor picture
        chosen = (chosen.double() * (math.sqrt(5) - 1) / 2).frac().mul(positions).long().unique()
    for p in patches(x, conv):
        p = p.double()  # (groups, n, some patches)
        M.baddbmm_(p, p.mT)
        mu += p.sum(2)
        size += (V * p.square().sum(1) + U).sqrt().sum().item()
        here = (chosen >= count) & (chosen < count + p.shape[2])
        sample.append(p[:, :, chosen[here] - count])
        count += p.shape[2]
    M, mu = M / count, mu / count

    mu2 = mu.square().sum(1).mean().item()
    tr_M2 = torch.linalg.vector_norm(M, dim=(1, 2)).square().mean().item()
    diag_M2 = M.diagonal(0, 1, 2).square().sum(1).mean().item()
    gaussian = 2 * V**2 * tr_M2 + 4 * U * V * mu2 + 2 * U**2
    w_cumulant, b_cumulant = excess_kurtosis * V**2, UNIFORM * U**2
    per_filter = _pair_covariance(
        torch.cat(sample, 2), positions, V, U, w_cumulant, b_cumulant, gaussian
    )
    per_filter[0, 0] = V * mu2 + U
    per_filter[2, 2] = gaussian + w_cumulant * diag_M2 + b_cumulant

    power = V * M.diagonal(0, 1, 2).sum(1).mean().item() + U
    mean_abs = math.sqrt(2 / math.pi) * size / (groups * count)
    expected = torch.tensor([0.0, mean_abs, power, 0.0], dtype=torch.float64)
    # y+ = (y + |y|) / 2, y- = (y - |y|) / 2; y+^2 = (y^2 + y|y|) / 2, y-^2 = (y^2 - y|y|) / 2
    to_halves = (
        torch.tensor([[1, 1, 0, 0], [1, -1, 0, 0], [0, 0, 1, 1], [0, 0, 1, -1]]).double() / 2
    )
    return Predicted(
        to_halves @ expected,
        to_halves @ (per_filter / conv.out_channels) @ to_halves.T,
        positions * conv.out_channels,
    )


def _weight_variance(weight: Tensor, scheme: str, a: float, mode: str) -> tuple[float, float]:
    """Return the variance V of one weight and its excess kurtosis, E[w^4] / V^2 - 3."""
    fan_in, fan_out = fans(weight)
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"unknown mode {mode!r}; known are fan_in, fan_out")
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
    return variances[scheme], 0.0 if scheme.endswith("normal") else UNIFORM


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

    From some of the patches, p of shape (groups, n, k), and from the exact variance of the mean of
    y^2 for Gaussian w and b. Two outputs y, y' have standard deviations s, s', correlation r and,
    where w or b is not Gaussian, the joint cumulant c = sum_i c_w p_i^2 p'_i^2 + c_b. What is
    averaged over all pairs is, exact for c = 0 and else with the leading term of c, which acts
    through the second Hermite polynomials of y / s and y' / s',
        Cov(|y|, |y'|)     = s s' 2/pi (sqrt(1 - r^2) + r asin r - 1) + c / (2 pi s s')
        Cov(y^2, |y'|)     = s^2 s' sqrt(2/pi) r^2 + c / (sqrt(2 pi) s')
        Cov(y|y|, y'|y'|)  = s^2 s'^2 2/pi (3 r sqrt(1 - r^2) + (1 + 2 r^2) asin r)
        Cov(y|y|, y')      = s^2 s' sqrt(2/pi) 2 r
    Odd functions of (w, b) do not covary with even ones.
    """
    k = p.shape[2]
    root = math.sqrt(2 / math.pi)
    K = V * (p.mT @ p) + U  # (groups, patches, patches)
    s = K.diagonal(0, 1, 2).sqrt()
    ss = s[:, :, None] * s[:, None, :]
    r = (K / ss.clamp_min(1e-300)).clamp(-1, 1)
    root_1_r2, asin = (1 - r * r).sqrt(), r.asin()
    square_by_abs = s.square()[:, :, None] * s[:, None, :]
    c = w_cumulant * (p.mT.square() @ p.square()) + b_cumulant

    def mean(pairs: Tensor) -> float:
        """Mean over all pairs of the data, of which a share 1/positions is one patch twice."""
        same = pairs.diagonal(0, 1, 2).mean().item()
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
        square_by_abs * root * r * r + c / s[:, None, :].clamp_min(1e-300) * root / 2
    )
    covariance[0, 3] = covariance[3, 0] = energy**3 * mean(square_by_abs * root * 2 * r)
    return covariance
