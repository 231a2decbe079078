"""Is an init sound? What the rows of a trace say, by thresholds that are derived or measured."""

import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from initlab.tracing import LayerTrace

Rows = Sequence["LayerTrace"]

# Where a number strays at random, 5 standard deviations are allowed (one in 3 million, if normal).
SDS = 5
# What a fit over depth may show beyond that: a factor of e^2 = 7.4, for pooling and zero padding.
# Measured: of the nets of torchvision with Kaiming weights, VGG-11 in eval mode shows most, e^1.
SLACK = 2.0
# One layer's factor over the median layer's. Measured: at most 14 in nets of torchvision that are
# sound (a classifier after a pooling). A layer drawn 100 times too large or small is beyond 30.
LEAP = math.log(30)
# In a plain net of ReLU and BatchNorm in train mode the gradient's norm grows by 1.21 a layer on
# its way back, sqrt(pi / (pi - 1)): Yang et al. 2019, A mean field theory of batch normalization.
NORM_GROWTH = math.log(math.pi / (math.pi - 1)) / 2
# A signal below this share of the rms is rounding: float32 has an eps of 1.2e-7.
ROUNDING = 1e-6
# A residual branch whose stream is more than 10 times as large may be small on purpose: the
# middle, on a log scale, of 1 (no stream) and 100 (a stream of rms 1, a branch times 0.01).
STREAM = 10

ADVICE = {
    "not finite": "Look at its weights and at its input.",
    "dead": "Start its biases at 0; if training did this, start again with a lower rate.",
    "constant": "Draw its weights at random; zeros are fine only where a residual branch ends.",
    "scale": "Draw its weights on the scale of the other layers.",
    "shrinks": "Draw the weights by fan_in with the gain of the activation, or add a normalisation "
    "(BatchNorm in eval mode does nothing before training).",
    "grows": "Draw the weights by fan_in with the gain of the activation, or add a normalisation.",
    "alike": "Start the biases at 0, and look for a mean that is large against the differences.",
    "gradient vanishes": "Draw the weights with the gain of the activation, or add a shortcut.",
    "gradient explodes": "Draw smaller weights in the layers before it, or add a shortcut.",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with an init.

    Attributes:
        layer: Name of the first layer that causes it.
        kind: One of the keys of `ADVICE`.
        value: The number that was judged: the factor of this layer ("scale"), of all layers
            ("shrinks", "grows", "gradient ..."), the dead share, signal / rms ("alike"), else rms.
        reason: What was measured, and what a sound net would show.
    """

    layer: str
    kind: str
    value: float
    reason: str

    @property
    def advice(self) -> str:
        """What to do."""
        return ADVICE[self.kind]

    def __str__(self) -> str:
        lines = [line for text in (self.reason, self.advice) for line in textwrap.wrap(text, 84)]
        return "\n    ".join([f"{self.layer}: {self.kind}", *lines])


def diagnose(rows: Rows) -> list[Problem]:
    """Return the problems that traced rows show, in the order of the layers.

    What follows from a problem is not reported again: the rows after a broken one are not judged,
    nor are the gradients, unless the forward pass is sound.
    """
    problems: list[Problem] = []
    order = {e.name: i for i, e in enumerate(rows)}
    for find in (_not_finite, _dead, _constant, _forward):
        if found := find(rows):
            end, problem = found
            problems.append(problem)
            rows = rows[:end]
    if not problems and (problem := _backward(rows)):
        problems.append(problem)
    return sorted(problems, key=lambda p: order[p.layer])


def _not_finite(rows: Rows) -> tuple[int, Problem] | None:
    for i, e in enumerate(rows):
        if not math.isfinite(e.rms):
            reason = f"The rms of its output is {e.rms}, that of its input {e.in_rms:.3g}."
            return i, Problem(e.name, "not finite", e.rms, reason)
    return None


def _dead(rows: Rows) -> tuple[int, Problem] | None:
    """Find an activation with more dead features than luck explains, or with all of them dead.

    With weights and biases drawn symmetrically about 0, a feature is below 0 for all inputs as
    often as it is above 0 for all. So the dead outnumber the others of m such features by 5 sqrt(m)
    with a probability of at most exp(-5^2 / 2) = 4e-6 (Hoeffding's inequality).
    """
    for i, e in enumerate(rows):
        if not e.dead or e.signs is None:
            continue
        (below, above), dead = e.signs, round(e.dead * e.features)
        everything = dead == e.features and below
        if everything or min(dead, below) - above > SDS * math.sqrt(below + above):
            source = i - 1 if i and _feeds(rows, i - 1) else i
            reason = (
                f"Of the {e.features} features of {e.name} ({e.kind}), {dead} are 0 for all inputs "
                f"and positions, and {above} are never below 0; biases of 0 give as many of both."
            )
            end = source if everything else len(rows)
            return end, Problem(rows[source].name, "dead", e.dead, reason)
    return None


def _constant(rows: Rows) -> tuple[int, Problem] | None:
    """Find an output that is the same for all inputs, though the layer's inputs differ.

    It is a problem if another layer or activation lives on it. At the end of a residual branch
    (also before its last normalisation), and in the last layer, zeros are a known way to start.
    """
    for i, e in enumerate(rows):
        same = e.in_signal > 0 and e.signal == 0 if e.rms else e.in_rms != 0
        if e.role == "activation" or not same:
            continue
        last = i
        while _feeds(rows, last):
            last += 1
            if rows[last].role not in ("norm", "affine"):
                reason = f"Its output is the same for all inputs, of rms {e.rms:.3g}."
                return i, Problem(e.name, "constant", e.rms, reason)
    return None


def _feeds(rows: Rows, i: int) -> bool:
    """Whether row i + 1 is given what row i puts out: the rms agrees to six digits."""
    return i + 1 < len(rows) and math.isclose(rows[i + 1].in_rms, rows[i].rms, rel_tol=1e-6)


class _Stage(NamedTuple):
    """A layer with the activations (or eval-mode BatchNorms) that it feeds directly.

    Attributes:
        row: Index of the layer.
        signal: Log of the factor by which it changes the signal (the rms, for a single input).
        share: The same for signal / rms.
        joined: Whether something far larger is added to its output, as at the end of a residual
            branch, or nothing comes after it: then a small output is no fault.
    """

    row: int
    signal: float
    share: float
    joined: bool


def _stages(rows: Rows) -> list[_Stage]:
    """Return the stages that show the scale of their layer: no normalisation takes it out."""
    stages = []
    for i, e in enumerate(rows):
        last = i
        while _feeds(rows, last) and rows[last + 1].role in ("activation", "affine"):
            last += 1
        end, after = rows[last], rows[last + 1 : last + 2]
        hidden = _feeds(rows, last) and after[0].role == "norm"
        if e.role != "layer" or hidden or not e.in_rms > 0 or _rounded(end):
            continue
        rms = _log(end.rms) - _log(e.in_rms)
        signal = rms if math.isnan(end.signal) else _log(end.signal) - _log(e.in_signal)
        joined = not after or after[0].in_rms > STREAM * end.rms
        stages.append(_Stage(i, signal, signal - rms, joined))
    return stages


def _path(rows: Rows, stages: Sequence[_Stage]) -> Rows:
    """Return the rows that show the scale of the signal: those of stages, and normalisations."""
    shown = {s.row for s in stages}
    return [e for i, e in enumerate(rows) if (i in shown or e.role == "norm") and not _rounded(e)]


def _forward(rows: Rows) -> tuple[int, Problem] | None:
    """Find a signal that shrinks or grows, one layer out of scale, or outputs that are alike."""
    while rows and rows[-1].role == "activation":  # a sigmoid or softmax shifts all outputs
        rows = rows[:-1]
    stages = _stages(rows)
    path = _path(rows, stages)
    if not path or rows[0].in_signal == 0:
        return None
    stray, loss = _stray(path), _relu_loss(rows)
    total = _fit([e.rms if math.isnan(e.signal) else e.signal for e in path])
    if not -stray - loss <= total <= stray:
        kind, limit = ("shrinks", -stray - loss) if total < 0 else ("grows", stray)
        by = [(s.signal, s.row) for s in stages if total > 0 or not s.joined]
        if culprits := _culprits(by, total):
            factor, row = culprits[0]
            reason = (
                f"Over {len(path)} layers the signal {_times(total)}, in this one it "
                f"{_times(factor)}; in a sound net of this size it {_times(limit)} at most."
            )
            if len(culprits) == 1:
                kind, total = "scale", factor
            return row, Problem(rows[row].name, kind, math.exp(total), reason)
    middle = statistics.median(s.signal for s in stages) if len(stages) > 2 else 0.0
    for s in stages:
        if s.signal - middle > LEAP or (s.signal - middle < -LEAP and not s.joined):
            reason = f"The signal {_times(s.signal)} here, in the median layer it {_times(middle)}."
            return s.row, Problem(rows[s.row].name, "scale", math.exp(s.signal), reason)
    # What the last layer is given: its own biases shift all outputs
    *_, last = (i for i, e in enumerate(rows) if e.role != "activation" and e.rms)
    end, given = rows[last], rows[last].role == "layer"
    signal, rms = (end.in_signal, end.in_rms) if given else (end.signal, end.rms)
    floor = math.exp(_log(_share(rows)) - loss - _pooled(rows) - SLACK)
    if signal < floor * rms:
        culprits = _culprits([(s.share, s.row) for s in stages if s.row < last], -1)
        layer = rows[culprits[0][1]] if culprits else end
        reason = (
            f"Of the rms of what {end.name} {'is given' if given else 'puts out'} only the share "
            f"{signal / rms:.2g} differs between inputs. As many ReLUs without biases, and the "
            f"pooling, leave {floor:.2g} or more."
        )
        return len(rows), Problem(layer.name, "alike", signal / rms, reason)
    return None


def _backward(rows: Rows) -> Problem | None:
    """Find gradients that vanish or explode on the way from the last layer to the first."""
    for e in reversed(rows):
        if e.grad_rms is not None and not math.isfinite(e.grad_rms):
            reason = f"The gradient of its output has rms {e.grad_rms}."
            return Problem(e.name, "not finite", e.grad_rms, reason)
    path = [e for e in _path(rows, _stages(rows)) if e.grad_rms]
    # A layer multiplies the rms going forward and the gradient's norm going backward by the same.
    norms = [(e.grad_rms or 0.0) * math.sqrt(math.prod(e.shape)) for e in path]
    # A residual branch that ends in small weights on purpose starves the layers inside it, not the
    # stream: of three layers the best off counts.
    total, stray = -_fit([max(norms[i : i + 3]) for i in range(len(norms))]), _stray(path)
    growth = NORM_GROWTH * sum(e.role == "norm" for e in path)
    if -stray <= total <= stray + growth:
        return None
    kind, limit = ("vanishes", -stray) if total < 0 else ("explodes", stray + growth)
    steps = [(_log(a) - _log(b), i + 1) for i, (a, b) in enumerate(pairwise(norms))]
    factor, row = _culprits(steps, total)[-1]
    reason = (
        f"From the last layer to the first its norm {_times(total)}, through this one it "
        f"{_times(factor)}; in a sound net of this size it {_times(limit)} at most."
    )
    return Problem(path[row].name, f"gradient {kind}", math.exp(total), reason)


def _culprits(changes: Sequence[tuple[float, int]], total: float) -> list[tuple[float, int]]:
    """Return the changes in the direction of `total` that are at least half as large as the worst.

    The first of them is named: the one fault, or, where all layers share it, the first layer.
    """
    sign = math.copysign(1, total)
    worst = max((sign * change for change, _ in changes), default=0.0)
    return [c for c in changes if worst > 0 and sign * c[0] >= worst / 2]


def _slopes(n: int) -> list[float]:
    """Return weights whose sum over n numbers is the rise of their line; of n < 3, none."""
    x = [k - (n - 1) / 2 for k in range(n)]
    return [a * (n - 1) / sum(b * b for b in x) if n > 2 else 0.0 for a in x]


def _fit(sizes: Sequence[float]) -> float:
    """Return the rise of a line through the logarithms."""
    return sum(w * _log(size) for w, size in zip(_slopes(len(sizes)), sizes, strict=True))


def _stray(path: Rows) -> float:
    """Return how far that line rises or falls by chance in a sound net.

    Given the layer before, the mean square M of n features after a ReLU has a relative variance of
    at most 5/n (notebook 6), so log rms makes a random walk with steps of variance 5/(4n).
    """
    slopes = _slopes(len(path))
    walk = (5 / (4 * e.features) * sum(slopes[i:]) ** 2 for i, e in enumerate(path))
    return SLACK + SDS * math.sqrt(sum(walk))


def _relu_loss(rows: Rows) -> float:
    """Return -log of the factor by which signal / rms falls through as many wide sound ReLU layers.

    Two inputs of cosine cos t have, after such a layer, the cosine (sin t + (pi - t) cos t) / pi
    (Cho & Saul 2009, Kernel methods for deep learning), and 1 - cosine is (signal / rms)^2.
    """
    cosine = 1 - _share(rows) ** 2
    for e in rows:
        if e.role == "activation":
            t = math.acos(min(cosine, 1.0))
            cosine = (math.sin(t) + (math.pi - t) * math.cos(t)) / math.pi
    return _log(_share(rows)) - _log(1 - cosine) / 2


def _pooled(rows: Rows) -> float:
    """Return -log of the factor by which signal / rms falls where no layer stands, but a pooling.

    The averages of two pictures over many positions are more alike than the pictures.
    """
    lost = 0.0
    for i, (e, after) in enumerate(pairwise(rows)):
        if _positions(e) > _positions(after) and not _feeds(rows, i):
            fall = _log(e.signal) - _log(e.rms) - _log(after.in_signal) + _log(after.in_rms)
            lost += max(0.0, fall)
    return lost


def _positions(e: "LayerTrace") -> float:
    return math.prod(e.shape[1:]) / e.features


def _share(rows: Rows) -> float:
    """Return signal / rms of the input; 1 if that is not known, as of tokens."""
    share = rows[0].in_signal / rows[0].in_rms if rows[0].in_rms else 1.0
    return min(share, 1.0) if share > 0 else 1.0


def _rounded(e: "LayerTrace") -> bool:
    return e.rms == 0 or e.signal < ROUNDING * e.rms


def _log(size: float) -> float:
    return math.log(max(size, 1e-300))


def _times(change: float) -> str:
    """Say in words what adding `change` to a logarithm does."""
    return f"{'falls' if change < 0 else 'grows'} {math.exp(abs(change)):.3g}-fold"
