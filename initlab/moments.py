"""Mean, std and rms: of a tensor, and of a layer's output over many draws of its weights.

With y+ = max(y, 0) and y- = min(y, 0), the mean of leaky_relu(y, slope) is E[y+] + slope E[y-], its
mean square E[y+^2] + slope^2 E[y-^2]: four numbers a draw, the half-moments, serve every slope.
"""

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Stats(NamedTuple):
    """Mean, std (unbiased) and rms, the root of the mean square, of all elements of a tensor."""

    mean: float
    std: float
    rms: float

    def __repr__(self) -> str:
        return f"mean {self.mean:z.4f}, std {self.std:.4f}, rms {self.rms:.4f}"  # z: no -0.0000


def stats(x: Tensor) -> Stats:
    """Return the mean, std and rms over all elements of `x`, summed in float64 without a graph.

    The std, of `torch.std`, is nan of one element. Raises a TypeError if `x` is no tensor of real
    floats, a ValueError if it is empty or not finite.

    >>> stats(torch.tensor([3.0, 4.0, 5.0]))
    mean 4.0000, std 1.0000, rms 4.0825
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"stats needs a tensor of real floats, as of x.float(), got {kind}")
    if x.numel() == 0:
        raise ValueError(f"stats of an empty tensor, shape {tuple(x.shape)}")
    x = x.detach().cpu().double()  # in this order: not every device has float64
    if bad := x.numel() - int(x.isfinite().sum()):
        raise ValueError(f"stats needs finite values: {bad} of {x.numel()} are nan or infinite")
    std = x.std().item() if x.numel() > 1 else math.nan
    return Stats(x.mean().item(), std, x.square().mean().sqrt().item())


def _with_sds(moments: "PredictedMoments | DrawnMoments") -> str:
    pairs = zip(("mean", "std", "rms"), moments[:3], moments[3:6], strict=True)
    return ", ".join(f"{name} {value:z.4f} ± {sd:.4f}" for name, value, sd in pairs)


class DrawnMoments(NamedTuple):
    """Mean, root of the mean variance, and rms of `n` draws; their sd's between single draws."""

    mean: float
    std: float
    rms: float
    mean_sd: float
    std_sd: float
    rms_sd: float
    n: int

    __repr__ = _with_sds


class PredictedMoments(NamedTuple):
    """What `DrawnMoments` of many draws will be; `doubt` says why the sd's may be far off."""

    mean: float
    std: float
    rms: float
    mean_sd: float
    std_sd: float
    rms_sd: float
    doubt: str = ""

    __repr__ = _with_sds

    def covers(self, measured: Stats | DrawnMoments) -> bool:
        """Say whether this prediction allows what was measured, on one draw or over several.

        Mean, std and rms must lie within 5 sd / sqrt(n) of the predicted, n the number of draws: a
        Gaussian number is farther off once in 1.7 million times. Raises a TypeError for what was
        not measured, a ValueError if the sd's are in doubt.

        >>> predicted = PredictedMoments(0.0, 1.0, 1.0, 0.02, 0.05, 0.05)
        >>> predicted.covers(Stats(0.0, 1.2, 1.2)), predicted.covers(Stats(0.0, 1.3, 1.3))
        (True, False)
        """
        if not isinstance(measured, Stats | DrawnMoments):
            raise TypeError(f"only what was measured can be covered, got {measured!r}")
        if self.doubt:
            raise ValueError(f"what this prediction covers is not known: {self.doubt}")
        n = getattr(measured, "n", 1)
        numbers = zip(measured[:3], self[:3], self[3:6], strict=True)
        return all(abs(m - told) <= 5 * sd / math.sqrt(n) for m, told, sd in numbers)


class Each(NamedTuple):
    """Mean, std and rms of each draw: float64 tensors of shape (n,)."""

    mean: Tensor
    std: Tensor
    rms: Tensor


@dataclass(frozen=True)
class Predicted:
    """What `predict` returns: `at` gives the moments after any leaky ReLU.

    Attributes:
        halves: float64 tensor (4,): E[y+], E[y-], E[y+^2], E[y-^2], over outputs and draws.
        covariance: float64 tensor (4, 4), between draws, of which each averages `count` outputs.
        skew: How many times as skewed the mean square of y is as a gamma number of its mean and sd.
        parts: How many uniform weights of one size would make y as little Gaussian as it is.
    """

    halves: Tensor
    covariance: Tensor
    count: int
    skew: float = 1.0
    parts: float = math.inf

    def at(self, slope: float | None = None) -> PredictedMoments:
        """Return the moments before an activation, or after a leaky ReLU of that (finite) slope.

        Warns where the sd's may be off by more than 5 %: with one or two weights, or filters.
        """
        at = _at_slope(slope)
        mean, square = (at @ self.halves).tolist()
        (m_var, both), (_, q_var) = (at @ self.covariance @ at.T).tolist()
        m_var, q_var = max(m_var, 0.0), max(q_var, 0.0)
        unbiased = self.count / max(self.count - 1, 1)
        variance = max(unbiased * (square - mean**2 - m_var), 0.0)
        root, rms_sd = _root(square, q_var, self.skew)
        # The mean moves with the rms, as b times it, and by itself: std^2 = rms^2 - (b rms + c)^2
        b = 2 * square * both / (root * q_var) if q_var else 0.0
        c, alone = mean - b * root, max(m_var - (b * rms_sd) ** 2, 0.0)
        s_var = (1 - b * b) ** 2 * q_var + 4 * (b * c * rms_sd) ** 2 - 4 * (1 - b * b) * c * both
        s_var += 4 * (mean**2 + (b * rms_sd) ** 2) * alone - 2 * alone**2
        _, std_sd = _root(variance, s_var, self.skew)
        # As many equal squares vary as much. With a slope below 0, where |y| counts most, it is the
        # skewed ones that are far off; the limits are from the cases of data/predict
        numbers, doubt = 2 * square**2 / q_var if q_var else math.inf, ""
        if self.parts < 1.6:
            doubt = f"{self.parts:.1f} uniform weights make up an output"
        elif numbers < max(8, 110 * (self.skew - 1) * ((slope or 0.0) < 0)):
            doubt = f"the mean square of a draw varies as that of {numbers:.1f} numbers"
        if doubt:
            warnings.warn(f"{doubt}: its sd's are rough", stacklevel=2)
        std, rms, mean_sd = map(math.sqrt, (variance, square, m_var))
        return PredictedMoments(mean, std, rms, mean_sd, std_sd, rms_sd, doubt)


@dataclass(frozen=True)
class Drawn:
    """What `draw` returns: `at` gives the moments after any leaky ReLU, `each` those of each draw.

    `halves`, float64 (n, 4), holds the means of y+, y-, y+^2, y-^2 over `count` outputs, by draw.
    """

    halves: Tensor
    count: int

    def each(self, slope: float | None = None) -> Each:
        """Return the single draws before an activation, or after a leaky ReLU of that slope."""
        mean, square = _at_slope(slope) @ self.halves.T
        unbiased = self.count / max(self.count - 1, 1)
        return Each(mean, (unbiased * (square - mean**2).clamp_min(0)).sqrt(), square.sqrt())

    def at(self, slope: float | None = None) -> DrawnMoments:
        """Return the moments of all draws together, as predictions speak of them."""
        each, n = self.each(slope), len(self.halves)
        std, rms = (values.square().mean().sqrt().item() for values in each[1:])
        sds = (values.std().item() if n > 1 else math.nan for values in each)
        return DrawnMoments(each.mean.mean().item(), std, rms, *sds, n=n)


def _root(mean: float, variance: float, skew: float) -> tuple[float, float]:
    """Return the mean and sd of the root of a positive number that is a constant + a gamma one.

    Its skewness is `skew` times that of a gamma number alone, 2 sqrt(variance) / mean. By
    E sqrt(q) = integral of (1 - E exp(-t q)) t^(-3/2) dt / sqrt(4 pi), with t = exp(u).
    """
    spread = max(variance, 0.0) / mean**2 if mean > 0 else 0.0
    if spread < 1e-6:
        return math.sqrt(mean), math.sqrt(mean * spread) / 2
    u = torch.arange(-80, 80, 0.125, dtype=torch.float64, device="cpu")
    skew = max(skew, 1.0)  # which it is, but for rounding
    width = spread * skew
    logs = u.exp() * (1 - 1 / skew) + (width * u.exp()).log1p() / (width * skew)
    root = -((-logs).expm1() * (-u / 2).exp()).sum().item() * 0.125 / math.sqrt(4 * math.pi)
    return math.sqrt(mean) * root, math.sqrt(mean * max(1 - root**2, 0.0))


def _at_slope(slope: float | None) -> Tensor:
    """Return the matrix (2, 4) that turns half-moments into mean and mean square at `slope`."""
    slope = 1.0 if slope is None else slope
    if not math.isfinite(slope):
        raise ValueError(f"the slope of the activation must be finite, got {slope}")
    rows = [[1.0, slope, 0.0, 0.0], [0.0, 0.0, 1.0, slope**2]]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")
