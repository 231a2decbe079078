"""Half-moments: four numbers a draw that give mean, std and rms after any leaky ReLU.

A leaky ReLU is linear on either side of 0. With y+ = max(y, 0) and y- = min(y, 0), the mean of
leaky_relu(y, slope) is E[y+] + slope E[y-], its mean square E[y+^2] + slope^2 E[y-^2].
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from initlab.stats import Stats


class Moments(NamedTuple):
    """Mean, std and rms of a layer's output, each with its standard deviation between draws.

    Predicted, the first three are floats: the expected mean, and the roots of the expected
    variance and of the expected mean square. Drawn, they are tensors of shape (n,), one entry a
    draw; printed are the mean over the draws, and the roots of their mean variance and mean square.
    """

    mean: float | Tensor
    std: float | Tensor
    rms: float | Tensor
    mean_sd: float
    std_sd: float
    rms_sd: float

    def __repr__(self) -> str:
        mean = torch.as_tensor(self.mean).mean().item()
        std, rms = (torch.as_tensor(x).square().mean().sqrt().item() for x in (self.std, self.rms))
        return (
            f"mean {mean:z.4f} ± {self.mean_sd:.4f}, std {std:.4f} ± {self.std_sd:.4f}, "
            f"rms {rms:.4f} ± {self.rms_sd:.4f}"
        )

    def cover(self, measured: Stats, sds: float = 5.0) -> bool:
        """Say whether mean, std and rms measured on one draw lie within `sds` of the predicted."""
        return all(
            abs(getattr(measured, name) - getattr(self, name)) <= sds * getattr(self, name + "_sd")
            for name in ("mean", "std", "rms")
        )


@dataclass(frozen=True)
class Predicted:
    """The expectation and covariance of the four half-moments; `at` makes moments of them.

    A leaky ReLU is linear on either side of 0, so that four numbers a draw serve every slope: the
    means of y and of y^2 over the outputs above 0, and the same below 0, each divided by the
    number of all outputs.

    Attributes:
        halves: float64 tensor (4,): E[y+], E[y-], E[y+^2], E[y-^2].
        covariance: float64 tensor (4, 4), between draws.
        count: Number of outputs that one draw averages over.
    """

    halves: Tensor
    covariance: Tensor
    count: int

    def at(self, slope: float = 1.0) -> Moments:
        """Return the moments of `leaky_relu(y, slope)`; slope 1 is no activation, 0 a ReLU.

        Raises:
            ValueError: `slope` is not finite.
        """
        to_mean, to_square = _slope_vectors(slope)
        mean, square = (to_mean @ self.halves).item(), (to_square @ self.halves).item()
        mean_var = (to_mean @ self.covariance @ to_mean).item()
        unbiased = self.count / max(self.count - 1, 1)
        variance = max(unbiased * (square - mean**2 - mean_var), 0.0)
        # std^2 = square - mean^2 moves with both, to first order
        to_var = to_square - 2 * mean * to_mean

        def sd_of_root(v: Tensor, value: float) -> float:
            sd = math.sqrt(max((v @ self.covariance @ v).item(), 0.0))
            return sd / (2 * math.sqrt(value)) if value > 0 else 0.0

        return Moments(
            mean,
            math.sqrt(variance),
            math.sqrt(square),
            math.sqrt(max(mean_var, 0.0)),
            sd_of_root(to_var, variance),
            sd_of_root(to_square, square),
        )

    def scaled(self, factor: float) -> "Predicted":
        """Return what weights and bias `factor` > 0 times as large give."""
        scale = _scale(factor)
        return Predicted(self.halves * scale, self.covariance * scale.outer(scale), self.count)


@dataclass(frozen=True)
class Drawn:
    """The four half-moments of each draw; `at` makes moments of them, for any slope.

    Attributes:
        halves: float64 tensor (n, 4), one row a draw: the means of y+, y-, y+^2 and y-^2 over all
            outputs, where y+ = max(y, 0) and y- = min(y, 0).
        count: Number of outputs that one draw averages over.
    """

    halves: Tensor
    count: int

    def at(self, slope: float = 1.0) -> Moments:
        """Return the moments of `leaky_relu(y, slope)`, tensors (n,), and their sd over the draws.

        Raises:
            ValueError: `slope` is not finite.
        """
        mean, square = (self.halves @ v for v in _slope_vectors(slope))
        unbiased = self.count / max(self.count - 1, 1)
        std = (unbiased * (square - mean**2).clamp_min(0)).sqrt()
        values = mean, std, square.sqrt()
        many = len(self.halves) > 1
        return Moments(*values, *(v.std().item() if many else math.nan for v in values))

    def scaled(self, factor: float) -> "Drawn":
        """Return what weights and bias `factor` > 0 times as large give."""
        return Drawn(self.halves * _scale(factor), self.count)


def _slope_vectors(slope: float) -> tuple[Tensor, Tensor]:
    """Return the vectors (4,) that turn half-moments into the mean and mean square at `slope`."""
    if not math.isfinite(slope):
        raise ValueError(f"the slope of the activation must be finite, got {slope}")
    vectors = torch.tensor([[1.0, slope, 0.0, 0.0], [0.0, 0.0, 1.0, slope**2]], dtype=torch.float64)
    return vectors[0], vectors[1]


def _scale(factor: float) -> Tensor:
    """Return the factors of the half-moments of `factor` times y."""
    if not 0 < factor < math.inf:
        raise ValueError(f"the factor must be positive and finite, got {factor}")
    return torch.tensor([factor, factor, factor**2, factor**2], dtype=torch.float64)
