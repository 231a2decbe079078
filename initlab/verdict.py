"""Is an init sound? What the rows of a trace say, by thresholds that are derived or measured."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from initlab.tracing import LayerTrace

# Where a number strays at random, 5 standard deviations are allowed (one in 3 million, if normal).
SDS = 5
# What a fit over depth may show beyond that, as a factor e^2 = 7, for pooling and zero padding.
# Measured: torchvision's nets of Kaiming weights show e^1.0 at most (VGG-11 in eval mode).
SLACK = 2.0
# One layer's factor against the median layer's. Measured: up to 14 in sound nets of torchvision
# (a classifier behind a pooling). A factor of 100 planted in a plain net is beyond this 30.
LEAP = math.log(30)
# In a plain net of ReLU and BatchNorm in train mode the gradient's norm grows by 1.21 a layer on
# its way back, sqrt(pi / (pi - 1)): Yang et al. 2019, A mean field theory of batch normalization.
NORM_GROWTH = math.log(math.pi / (math.pi - 1)) / 2
TINY = 1e-300  # stands for 0 in logarithms
# Below this share of the rms, float32 (eps 1e-7) shows rounding instead of signal.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an init.

    Attributes:
        layer: Name of the first layer that causes it.
        kind: "not finite", "dead", "constant", "scale", "shrinks", "grows", "alike",
            "gradient vanishes" or "gradient explodes".
        value: The number that was judged, which `reason` names.
        reason: What was measured, and what a sound net would show.
        advice: What to do.
    """

    layer: str
    kind: str
    value: float
    reason: str
    advice: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.kind}. {self.reason} {self.advice}"


@dataclass(frozen=True)
class _Stage:
    """A layer and the activations (or eval-mode BatchNorms) that it feeds directly.

    Attributes:
        row: Index of the layer.
        name: Its name.
        factor: Logarithm of the factor by which the signal changes (the rms, for a single input).
        dilution: The same for signal / rms.
        hidden: Whether it feeds a normalisation, which takes out its scale.
        lasts: False if something ten times as large joins the output before the next row, as on
            the last layer of a residual branch: there a small output is no fault.
    """

    row: int
    name: str
    factor: float
    dilution: float
    hidden: bool
    lasts: bool


def diagnose(rows: Sequence["LayerTrace"]) -> list[Problem]:
    """Return the problems that traced rows show, in the order of the layers.

    What follows from a problem is not reported again: rows after a broken one are not judged, and
    the gradient only where the forward pass is sound.
    """
    problems = []
    for find in (_not_finite, _dead, _constant):
        if found := find(rows):
            end, problem = found
            problems.append(problem)
            rows = rows[:end]
    stages = _stages(rows)
    problems += _forward(rows, stages)
    if not problems:
        problems += _backward(rows, stages)
    order = {e.name: -i for i, e in enumerate(rows)}
    return sorted(problems, key=lambda p: -order.get(p.layer, -len(rows)))


def _not_finite(rows: Sequence["LayerTrace"]) -> tuple[int, Problem] | None:
    for i, e in enumerate(rows):
        if not math.isfinite(e.rms):
            reason = f"The output's rms is {e.rms}, the input's {e.in_rms:.3g}."
            return i, Problem(e.name, "not finite", e.rms, reason, "Look at its weights.")
    return None


def _dead(rows: Sequence["LayerTrace"]) -> tuple[int, Problem] | None:
    """Find an activation with more dead features than luck explains.

    If weights and biases are drawn symmetrically about 0, a feature is 0 for all inputs as often as
    it is above 0 for all. So of m such features, the dead outnumber the others by 5 sqrt(m) with a
    probability of at most exp(-5^2 / 2) = 4e-6 (Hoeffding's inequality).
    """
    for i, e in enumerate(rows):
        if e.dead is None or e.signs is None or not e.dead:
            continue
        (off, on), dead = e.signs, round(e.dead * e.features)
        if (dead == e.features and off) or min(dead, off) - on > SDS * math.sqrt(off + on):
            source = rows[i - 1] if i and _feeds(rows, i - 1) else e
            reason = (
                f"Of the {e.features} features of {e.name}, {dead} are 0 for every input and "
                f"position, {on} are never below 0; symmetric weights give as many of both."
            )
            advice = "Start with a bias of 0; after training steps, lower the rate."
            end = i if dead == e.features else len(rows)
            return end, Problem(source.name, "dead", e.dead, reason, advice)
    return None


def _constant(rows: Sequence["LayerTrace"]) -> tuple[int, Problem] | None:
    """Find an output that is the same for all inputs, and on which a layer or activation depends.

    Zeros at the end of a residual branch, or of the net, are a known way to start: no problem.
    """
    for i, e in enumerate(rows):
        if e.role == "activation" or e.in_rms == 0 or (e.signal if e.rms else 0) != 0:
            continue
        if e.rms and not e.in_signal > 0:
            continue
        last = i
        while last + 1 < len(rows) and _feeds(rows, last) and rows[last + 1].role in NORMS:
            last += 1
        if last + 1 < len(rows) and _feeds(rows, last):
            reason = f"The output is the same for every input, of rms {e.rms:.3g}."
            return i, Problem(e.name, "constant", e.rms, reason, "Draw its weights at random.")
    return None


NORMS = ("norm", "affine")


def _feeds(rows: Sequence["LayerTrace"], i: int) -> bool:
    """Whether row i + 1 is given what row i puts out: the rms agrees to six digits."""
    return math.isclose(rows[i + 1].in_rms, rows[i].rms, rel_tol=1e-6)


def _stages(rows: Sequence["LayerTrace"]) -> list[_Stage]:
    stages = []
    for i, e in enumerate(rows):
        if e.role != "layer" or not e.in_rms > 0:
            continue
        last = i
        while (
            last + 1 < len(rows)
            and _feeds(rows, last)
            and rows[last + 1].role in ("activation", "affine")
        ):
            last += 1
        more, end = last + 1 < len(rows), rows[last]
        hidden = more and _feeds(rows, last) and rows[last + 1].role == "norm"
        lasts = more and rows[last + 1].in_rms < 10 * end.rms
        if end.signal < ROUNDING * end.rms:
            continue
        rms = _log(end.rms) - _log(e.in_rms)
        factor = rms if math.isnan(end.signal) else _log(end.signal) - _log(e.in_signal)
        stages.append(_Stage(i, e.name, factor, factor - rms, hidden, lasts))
    return stages


def _forward(rows: Sequence["LayerTrace"], stages: Sequence[_Stage]) -> list[Problem]:
    open_ = [s for s in stages if not s.hidden]
    path = _path(rows, stages)
    if not path or rows[0].in_signal == 0:
        return []
    sizes = [e.rms if math.isnan(e.signal) else e.signal for e in path]
    total, allowed = _fit(sizes), _allowed(path)
    alike = _relu_loss(rows)
    advice = "Draw the weights with the gain of the activation, initialize_(model, a=...)"
    if total < -allowed - alike or total > allowed:
        kind = "shrinks" if total < 0 else "grows"
        sound = math.exp(allowed + (alike if total < 0 else 0))
        culprits = _culprits([s for s in open_ if s.lasts or total > 0], math.copysign(1, total))
        if culprits:
            first = culprits[0]
            reason = (
                f"Over {len(path)} layers the signal {kind} by a factor of {math.exp(abs(total)):.2g}, "
                f"in {first.name} by {math.exp(abs(first.factor)):.2g}; a sound net of this depth "
                f"and width stays below {sound:.2g}."
            )
            kind = kind if len(culprits) > 1 else "scale"
            return [Problem(first.name, kind, math.exp(first.factor), reason, advice)]
    middle = statistics.median([s.factor for s in open_]) if len(open_) > 2 else 0.0
    for s in open_:
        leap = s.factor - middle
        if leap > LEAP or (leap < -LEAP and s.lasts):
            reason = (
                f"The signal changes by a factor of {math.exp(s.factor):.2g}, in the median layer "
                f"by {math.exp(middle):.2g}; sound nets stay within 30 times of that."
            )
            return [Problem(s.name, "scale", math.exp(s.factor), reason, advice)]
    end = next(e for e in reversed(rows) if e.rms)
    if end.signal / end.rms < (floor := math.exp(-alike - SLACK) * _start(rows)):
        culprits = _culprits([replace_factor(s) for s in open_], -1)
        name = culprits[0].name if culprits else end.name
        reason = (
            f"Only {end.signal / end.rms:.2g} of the rms of {end.name} differs between inputs; "
            f"ReLUs alone leave more than {floor:.2g}."
        )
        return [Problem(name, "alike", end.signal / end.rms, reason, "Start with a bias of 0.")]
    return []


def replace_factor(s):
    import dataclasses
    return dataclasses.replace(s, factor=s.dilution)


def _backward(rows: Sequence["LayerTrace"], stages: Sequence[_Stage]) -> list[Problem]:
    path = [e for e in _path(rows, stages) if e.grad_rms]
    if len(path) < 3:
        return []
    # A layer's factor is the same for the rms forward and for the gradient's norm backward.
    norms = [e.grad_rms * math.sqrt(math.prod(e.shape)) for e in path]
    total, allowed = -_fit(norms), _allowed(path)
    growth = NORM_GROWTH * sum(e.role == "norm" for e in path)
    if -allowed <= total <= allowed + growth:
        return []
    sign = math.copysign(1, total)
    steps = [_log(a) - _log(b) for a, b in zip(norms, norms[1:], strict=False)]
    worst = max(sign * s for s in steps)
    at = max(i for i, s in enumerate(steps) if sign * s >= worst / 2)
    kind = "gradient vanishes" if total < 0 else "gradient explodes"
    reason = (
        f"From the last layer to the first its norm changes by a factor of {math.exp(total):.2g}; "
        f"a sound net of this depth and width stays within {math.exp(allowed + growth * (total > 0)):.2g}."
    )
    return [Problem(path[at + 1].name, kind, math.exp(total), reason, "")]


def _path(rows, stages):
    """Rows that show how large the signal is: norms, and layers that no norm follows; not zeros."""
    shown = {s.row for s in stages if not s.hidden}
    return [
        e
        for i, e in enumerate(rows)
        if e.rms and not e.signal < ROUNDING * e.rms and (i in shown or e.role == "norm")
    ]


def _culprits(stages: Sequence[_Stage], sign: float) -> list[_Stage]:
    """Stages that change the signal in this direction at least half as much as the worst."""
    worst = max((sign * s.factor for s in stages), default=0.0)
    return [s for s in stages if sign * s.factor >= worst / 2 > 0]


def _fit(sizes: Sequence[float]) -> float:
    """Logarithm of the change from first to last, along a line fitted to all."""
    n = len(sizes)
    if n < 3:
        return 0.0
    x = [k - (n - 1) / 2 for k in range(n)]
    slope = sum(a * _log(size) for a, size in zip(x, sizes, strict=True)) / sum(a * a for a in x)
    return slope * (n - 1)


def _allowed(path: Sequence["LayerTrace"]) -> float:
    """How far a fitted logarithm strays over these layers in a sound net.

    Given the layer before, the mean square of a layer of n features has E[M^2] / E[M]^2 <= 1 + 5/n
    (ReLU, notebook 6), so its logarithm makes a random walk of variance 5/n a layer, that of the
    rms a quarter of that. A line fitted to a random walk ends with 6/5 of the walk's variance.
    """
    return SLACK + SDS * math.sqrt(1.2 * sum(5 / e.features for e in path) / 4)


def _relu_loss(rows: Sequence["LayerTrace"]) -> float:
    """How much signal / rms falls in a wide sound net with as many ReLUs, as a logarithm.

    Two inputs of cosine c have, after a ReLU, the cosine (sin t + (pi - t) cos t) / pi, cos t = c:
    Cho & Saul 2009, Kernel methods for deep learning. Of the mean square, 1 - c differs.
    """
    cosine = 1 - _start(rows) ** 2
    for e in rows:
        if e.role == "activation":
            t = math.acos(min(1.0, max(-1.0, cosine)))
            cosine = (math.sin(t) + (math.pi - t) * math.cos(t)) / math.pi
    return _log(_start(rows)) - _log(max(1 - cosine, 0)) / 2


def _start(rows) -> float:
    ratio = rows[0].in_signal / rows[0].in_rms if rows[0].in_rms else 1.0
    return min(ratio, 1.0) if ratio > 0 else 1.0


def _log(size: float) -> float:
    return math.log(max(size, TINY))
