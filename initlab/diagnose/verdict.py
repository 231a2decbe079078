"""Is an init sound? What the rows of a trace say, by limits that are derived or measured.

Scales are compared along the data's own paths: each row goes on from that of its parents whose
signal is largest, and begins anew at inputs, embeddings, recurrent layers and norms.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from initlab.diagnose.rows import IDLE, ROUNDING, LayerTrace, Problem, Rows, some

# Where a number strays at random, 3 standard deviations are allowed, of a bound that is generous.
SDS = 3
# What a path may show beyond that: a factor of e^2.5 = 12, for pooling, zero padding and gains
# that are a little low throughout.
SLACK = 2.5
# How much further it may fall, and, after a norm, each further layer: by custom, as with a std of
# 0.02 at any width.
LOW, CUSTOM = 0.5, math.log(6)
# One layer's factor over the median layer's.
LEAP = math.log(30)
# The same for layers whose weights have one shape, before the spread that their width allows.
LIKE = math.log(4)
# In a plain net of ReLU and BatchNorm in train mode the gradient's norm grows by 1.21 a layer on
# its way back, sqrt(pi / (pi - 1)): Yang et al. 2019, A mean field theory of batch normalization.
NORM_GROWTH = math.log(math.pi / (math.pi - 1)) / 2
STREAM = 10  # how much larger a sum is than a summand that may be small on purpose
INPUT = 30  # how far from 1 the rms of the input may be
LOUD = 10  # the rms of the output, or its loss above a guess's: it is all but certain, of one class
FEW = 8  # features that may all be dead by luck, where others go past them
FORGOTTEN = 1e-12  # what is left, after all steps, of a gradient to the first one
# What a norm in train mode would change
IDLED = {"scale", "shrinks", "grows", "alike", "dead", "constant", "loud output", "silent output"}
IDLED |= {"gradient vanishes", "gradient explodes"}


@dataclass
class Graph:
    """The rows with what follows from their parents.

    Attributes:
        rows: In the order of execution.
        info: What the trace knows besides.
        spoiled: Rows that are not judged, since they show a problem that was found before them.
        children: Of each row, those that it feeds.
        main: Of each row, the parent with the largest signal; None at a start.
        ends: The rows that the loss, or the output, is made of.
    """

    rows: Rows
    info: dict[str, Any] = field(default_factory=dict)
    spoiled: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.children: list[list[int]] = [[] for _ in self.rows]
        self.main: list[int | None] = []
        for i, e in enumerate(self.rows):
            for p in e.parents:
                self.children[p].append(i)
            main = max(e.parents, key=lambda p: self.rows[p].size, default=None)
            if main is not None:
                before = self.rows[main]
                # What it is given comes from elsewhere: the input, or parameters
                elsewhere = e.in_rms > STREAM * before.rms * len(e.parents) ** 0.5
                main = None if elsewhere or not before.size else main
            self.main.append(main)
        ends = [i for i in self.info.get("ends", ()) if i < len(self.rows)]
        self.ends = ends or [i for i, after in enumerate(self.children) if not after]

    def live(self) -> Iterator[tuple[int, LayerTrace]]:
        """Yield the rows that are not spoiled, while more of them are."""
        return ((i, e) for i, e in enumerate(self.rows) if i not in self.spoiled)

    def spoil(self, i: int, lasting: bool = False) -> None:
        """Leave out row i, and what follows: up to the next norms, or also beyond if `lasting`."""
        todo = [i]
        while todo:
            if (j := todo.pop()) not in self.spoiled:
                self.spoiled.add(j)
                todo += [c for c in self.children[j] if lasting or self.rows[c].role != "norm"]

    def end(self, i: int, through: bool = False) -> int:
        """Return the last of the activations (or idle norms) that follow row i directly.

        Also past a factor that is small on purpose if `through`.
        """
        while len(self.children[i]) == 1:
            (child,) = self.children[i]
            e = self.rows[child]
            if e.role not in ("activation", "affine") or len(e.parents) > 1:
                break
            if e.op == "mul" and not through:
                break
            i = child
        return i

    def normed(self, i: int) -> bool:
        """Whether a norm takes the scale of row i out, before anything is added to it."""
        after = [self.rows[c] for c in self.children[self.end(i)]]
        return bool(after) and all(e.role == "norm" and len(e.parents) == 1 for e in after)

    def meets(self, c: int, end: int) -> bool:
        """Whether row c is given something larger than what row `end` puts out."""
        e, rms = self.rows[c], self.rows[end].rms
        larger = len(e.parents) > 1 and self.main[c] != end
        if e.gated:  # in a product no factor may be near 0
            larger = larger and rms > 1 / STREAM
        return larger or e.in_rms > STREAM * rms

    def joined(self, i: int) -> bool:
        """Whether row i meets something larger wherever it goes, or nothing comes after it."""
        end = self.end(i, through=True)
        return all(self.meets(c, end) for c in self.children[end])

    def alone(self, i: int) -> bool:
        """Whether layers after row i are given nothing else, and nothing goes past it."""
        after = [(c, self.rows[c]) for c in self.children[i]]
        if not all(len(e.parents) == 1 or not e.size > 0 for _, e in after):
            return False
        return any(e.role in ("layer", "mixer") or self.alone(c) for c, e in after)

    @cached_property
    def aside(self) -> set[int]:
        """The rows on branches: by way of layers, all of theirs meets something larger."""
        found: set[int] = set()
        for i in reversed(range(len(self.rows))):
            end = self.end(i, through=True)
            after = self.children[end]
            if after and all(c in found or self.meets(c, end) for c in after):
                found.add(i)
        return found

    @cached_property
    def healed(self) -> set[int]:
        """The rows that reach no output but by way of norms, so that a small scale is no harm."""
        found: set[int] = set()
        for i in reversed(range(len(self.rows))):
            after = self.children[i]
            if i not in self.ends and all(c in found or self.rows[c].role == "norm" for c in after):
                found.add(i)
        return found

    def path(self, i: int | None) -> list[int]:
        """Return the rows from the start of the data's path to row i."""
        rows = []
        while i is not None:
            rows.append(i)
            i = self.main[i]
        return rows[::-1]

    def segment(self, i: int) -> list[int]:
        """Return the path since its last norm, embedding or recurrent layer."""
        path = self.path(i)
        begin = [k for k, j in enumerate(path) if self.rows[j].role in ("norm", "mixer")]
        return path[begin[-1] + 1 :] if begin else path

    def level(self, rows: Sequence[int]) -> float:
        """Return the log of the factor by which the signal changes along a path.

        But for what falls where no weight stands, as by pooling: that is not a layer's fault.
        """
        level = 0.0
        for i in rows:
            e, main = self.rows[i], self.main[i]
            before = math.nan if main is None else self.rows[main].size
            given = e.given if e.given > 0 else before
            if given > 0:
                level += log(e.size) - log(given)
                level += max(0.0, log(given) - log(before)) if before > 0 else 0.0
        return level

    def walk(self, rows: Sequence[int]) -> float:
        """Return the variance of that number in sound nets.

        After n features of ReLUs the mean square M has, given the layer before, a relative variance
        of at most 5/n (notebook 6), so log rms makes a random walk of steps of variance 5/(4n).
        """
        layers = (e for e in (self.rows[i] for i in rows) if e.role == "layer")
        return sum(5 / (4 * e.features) for e in layers)

    def factor(self, i: int) -> float:
        """Return the log of the factor of a layer, with the activations that follow it."""
        return log(self.rows[self.end(i)].size) - log(self.rows[i].given)

    def scaled(self) -> list[int]:
        """Return the layers whose factor shows the scale of their weights."""
        return [
            i
            for i, e in self.live()
            if e.role == "layer"
            and not e.learned
            and e.given > 0
            and not _rounded(self.rows[self.end(i)])
            and not self.normed(i)
        ]

    def idle(self, i: int) -> bool:
        """Whether a BatchNorm that does nothing stands before or after row i, on any path."""
        for links in (self.children, [e.parents for e in self.rows]):
            seen, todo = set(), [i]
            while todo:
                if (j := todo.pop()) not in seen:
                    seen.add(j)
                    todo += links[j]
            if any(self.rows[j].idle for j in seen):
                return True
        return False


def diagnose(rows: Rows, info: dict[str, Any] | None = None) -> list[Problem]:
    """Return the problems that traced rows show, in the order of the layers.

    What follows from a problem is not reported again: what it spoils is not judged, nor are the
    gradients, unless the forward pass is sound.
    """
    return judge(rows, info)[0]


def judge(rows: Rows, info: dict[str, Any] | None = None) -> tuple[list[Problem], set[str]]:
    """Return the problems, and the names of the parameters that were judged."""
    g, problems = Graph(rows, info or {}), []
    for find in (_not_finite, _equal, _dead, _constant, _mean, _input, _forward):
        problems += find(g)
    for find in (_output, _reached, _memory, _backward):
        problems += [] if problems else find(g)
    order = {e.name: i for i, e in enumerate(rows)}
    problems.sort(key=lambda p: order[p.layer])
    shown = [e for _, e in g.live() if (e.size > 0 or e.given > 0) and not e.learned]
    shown += [rows[order[p.layer]] for p in problems]
    scales = {order[p.layer] for p in problems if p.kind in ("scale", "shrinks", "grows")}
    blown, kinds = Graph(rows), defaultdict(list)
    for i in scales:
        blown.spoil(i)
    for p in problems:
        died = order[p.layer] in blown.spoiled - scales  # units die of a scale, too
        if not died or p.kind not in ("dead", "constant"):
            kinds[p.kind].append(p)
    for kind, alike in kinds.items():  # what one rule drew is said once, a scale may be a slip
        most = 3 if kind == "scale" else 1
        if more := [p.layer for p in alike[most:]]:
            last = alike[most - 1]
            reason = f"{last.reason} The same holds for {some(more)}."
            alike[most - 1 :] = [replace(last, reason=reason)]
    problems = sorted((p for alike in kinds.values() for p in alike), key=lambda p: order[p.layer])
    problems = [
        replace(p, fix="", idle=True) if p.kind in IDLED and g.idle(order[p.layer]) else p
        for p in problems
    ]
    return problems, {n for e in shown for w in e.weights for n in w.names}


def remark(rows: Rows, info: dict[str, Any] | None = None) -> list[str]:
    """Return what is no fault of the init, but good to know."""
    info = info or {}
    said = []
    if info.get("n") == 1:
        said.append("With one input there is no signal: only sizes were judged.")
    elif rows and _same(rows):
        said.append("All inputs are the same: there is no signal, only sizes were judged.")
    elif silent := [y for y in info.get("outputs", ()) if _still(y["signal"], y["rms"])]:
        loss, classes = info.get("guess") or (0.0, 0)
        guess = f" The loss, {loss:.4g}, is that of a guess, ln {classes}."
        guess *= classes > 1 and math.isclose(loss, math.log(classes), rel_tol=1e-6)
        rms = silent[0]["rms"]
        said.append(f"An output is the same for all inputs, of rms {rms:.3g}: no signal.{guess}")
    if info.get("trained"):
        said.append("Its norms look trained: the verdict is on an init.")
    copies = defaultdict(set)
    for e in rows:
        for w in e.weights:
            if w.std and not w.equal:
                copies[w.numel, w.mean, w.std].add(w.names[0])
    same = [sorted(names) for names in copies.values() if len(names) > 1]
    if same:
        said.append(f"Weights that are copies of each other: {', '.join(same[0][:3])}.")
    if any(e.idle for e in rows):
        said.append(IDLE)
    return said


def _not_finite(g: Graph) -> Iterator[Problem]:
    for i, e in g.live():
        if not math.isfinite(e.rms):
            g.spoil(i, lasting=True)
            reason = f"The rms of its output is {e.rms}, that of its input {e.in_rms:.3g}."
            yield Problem(e.name, "not finite", e.rms, reason)


def _equal(g: Graph) -> Iterator[Problem]:
    """Find weights whose units are all the same, but not 0: nothing tells them apart."""
    for i, e in g.live():
        for w in e.weights:
            if w.equal and w.trains and (w.mean or w.std):
                g.spoil(i)
                reason = f"All units of {w.names[0]} have the same weights."
                yield Problem(e.name, "equal units", 0.0, reason, e.fix)
                break


def _dead(g: Graph) -> Iterator[Problem]:
    """Find activations with more dead features than luck explains, or with all of them dead.

    With weights and biases drawn symmetrically about 0, a feature is below 0 for all inputs as
    often as it is above 0 for all. So the dead outnumber the others of m such features by 5 sqrt(m)
    with a probability of at most exp(-5^2 / 2) = 4e-6 (Hoeffding's inequality).
    """
    for i, e in g.live():
        fed = [g.rows[p] for p in e.parents]
        dead = round((e.dead or 0) * e.features)
        luck = dead == e.features < FEW and g.children[i] and not g.alone(i)
        if not dead or luck or (len(fed) == 1 and fed[0].rms == 0):
            continue
        if dead == e.features or dead - e.above > 5 * math.sqrt(dead + e.above):
            source = e.parents[0] if len(e.parents) == 1 else i
            if dead == e.features:
                g.spoil(source, lasting=True)
            reason = (
                f"Of the {e.features} features of {e.name} ({e.kind}), {dead} are 0 for all inputs "
                f"and positions, and {e.above} are never below 0; biases of 0 give as many of both."
            )
            yield Problem(g.rows[source].name, "dead", e.dead, reason)


def _constant(g: Graph) -> Iterator[Problem]:
    """Find outputs that are the same for all inputs, though the layer's inputs differ.

    It is a problem if all that comes after lives on it alone. At the end of a residual branch, and
    in the last layer, zeros are a known way to start.
    """
    for i, e in g.live():
        same = e.in_signal > 0 and e.signal == 0 if e.rms else e.in_rms != 0
        if e.role != "activation" and same and g.alone(i):
            g.spoil(i, lasting=True)
            reason = f"Its output is the same for all inputs, of rms {e.rms:.3g}."
            yield Problem(e.name, "constant", e.rms, reason, e.fix)


def _mean(g: Graph) -> Iterator[Problem]:
    """Find weights whose mean outweighs their differences in the sum over fan_in."""
    for i, e in g.live() if not g.info.get("trained") else ():
        for w in e.weights if e.role == "layer" else ():
            common = abs(w.mean) * math.sqrt(w.fan_in)
            sure = abs(w.mean) * math.sqrt(min(w.numel, 1 << 18)) > 6 * w.std
            if w.std and common > 2 * w.std and sure and w.trains:
                g.spoil(i)
                reason = f"The mean of {w.names[0]} is {w.mean:.3g}, their std {w.std:.3g}."
                yield Problem(e.name, "mean", w.mean, reason, e.fix)
                break


def _input(g: Graph) -> Iterator[Problem]:
    """Find inputs, and embeddings that layers are given as they are, out of scale."""
    for i, e in g.live():
        if e.role != "layer" or not e.in_rms > 0 or 1 / INPUT <= e.in_rms <= INPUT:
            continue
        picked = [p for p in e.parents if g.rows[p].role == "mixer" and not g.rows[p].in_rms > 0]
        if not e.parents and not e.learned and not g.normed(i):
            g.spoil(i)
            reason = f"The input has an rms of {e.in_rms:.3g}."
            yield Problem(e.name, "input scale", e.in_rms, reason)
        elif picked and len(picked) == len(e.parents):
            worst = max(picked, key=lambda p: abs(log(g.rows[p].rms)))
            if g.rows[worst].rms > 1 or worst not in g.healed:
                g.spoil(worst)
                name, rms = g.rows[worst].name, g.rows[worst].rms
                yield Problem(name, "scale", rms, f"Its output has an rms of {rms:.3g}.")


def _forward(g: Graph) -> Iterator[Problem]:
    """Find signals that shrink or grow, and layers out of scale."""
    if _same(g.rows):
        return
    scaled = g.scaled()
    for i in scaled:
        if i in g.spoiled:
            continue
        end, segment = g.end(i), g.segment(g.end(i))
        on = [j for j in segment if j in scaled and j <= i]
        level, limit = g.level(segment), SLACK + SDS * math.sqrt(g.walk(segment))
        loss = relu_loss(sum(g.rows[j].role == "activation" for j in segment), 1.0)
        begin, first = g.main[segment[0]], g.rows[segment[0]]
        normed = begin is not None
        start = g.rows[begin].rms if normed else first.in_rms
        grown = log(g.rows[end].rms) - log(start if start > 0 else first.rms)
        grown = min(grown, level + loss)
        branch = i in g.aside and normed and len(on) < 5
        level = grown if grown > limit else 0.0 if branch else level
        custom = LEAP + CUSTOM * (min(len(on), 3) - 1) if normed else 0.0
        low = -max(limit + LOW, custom) - loss
        if low <= level <= limit or (level < 0 and g.joined(i)):
            continue
        by = [(g.factor(j), j) for j in on if level > 0 or not g.joined(j)]
        if culprits := _culprits(by, level):
            (factor, row), kind = culprits[0], "shrinks" if level < 0 else "grows"
            value = level
            reason = (
                f"Over {len(on)} layer{'s' * (len(on) != 1)} the signal {times(level)}, in this "
                f"one it {times(factor)}; {allowed(level, low if level < 0 else limit)}."
            )
            if len(culprits) == 1:
                kind, value = "scale", factor
            lines = "\n".join(filter(None, (g.rows[j].fix for _, j in culprits[:2])))
            g.spoiled.add(row)
            for c in g.children[end]:  # the others are judged
                g.spoil(c)
            yield Problem(g.rows[row].name, kind, math.exp(value), reason, lines)
    yield from _leaps(g)


def _leaps(g: Graph) -> Iterator[Problem]:
    """Find layers whose factor is far from that of the others."""
    alike, scaled = defaultdict(list), g.scaled()
    middle = statistics.median(map(g.factor, scaled)) if len(scaled) > 2 else 0.0
    for i in scaled:
        alike[_shape(g.rows[i])].append(g.factor(i))
    for i in scaled:
        if i in g.spoiled:
            continue
        change, same = g.factor(i), alike[_shape(g.rows[i])]
        usual, limit, what = middle, LEAP, "the median layer"
        if len(same) > 3:
            usual, what = statistics.median(same), f"the median of {len(same)} layers like it"
            limit = LIKE + SDS * math.sqrt(5 / (4 * g.rows[i].features))
        if change - usual > limit or (change - usual < -limit and not g.joined(i)):
            reason = f"The signal {times(change)} here, in {what} it {times(usual)}."
            g.spoil(i)
            yield Problem(g.rows[i].name, "scale", math.exp(change), reason, g.rows[i].fix)


def _output(g: Graph) -> Iterator[Problem]:
    """Find outputs that are alike, too large, or without the signal that the last layer has."""
    ends = [i for i in g.ends if g.rows[i].rms > 0]
    path = g.path(max(ends, default=None))
    if not path or _same(g.rows):
        return
    outputs, last = g.info.get("outputs", ()), g.rows[path[-1]]
    if not _rounded(last) and outputs and all(_still(y["signal"], y["rms"]) for y in outputs):
        reason = f"It has a signal of {last.signal:.3g}, and the output of the network has none."
        yield Problem(last.name, "silent output", 0.0, reason)
        return
    while len(path) > 1 and g.rows[path[-1]].role == "activation":  # they shift all outputs
        path.pop()
    end, given = g.rows[path[-1]], g.rows[path[-1]].role == "layer"
    signal, rms = (end.in_signal, end.in_rms) if given else (end.signal, end.rms)
    pooled = 0.0
    for i, j in pairwise(path):
        a, b = g.rows[i], g.rows[j]
        if _positions(a) > _positions(b) and a.signal > 0 and b.in_signal > 0:
            fall = log(a.signal) - log(a.rms) - log(b.in_signal) + log(b.in_rms)
            pooled += max(0.0, fall)
    share = _share(g)
    active = sum(g.rows[i].role == "activation" for i in path[:-1])
    floor = math.exp(log(share) - relu_loss(active, share) - pooled - SLACK)
    small = any(g.rows[p].op == "mul" for j in path for p in g.rows[j].parents)  # on purpose
    if signal < floor * rms and not small:
        reason = (
            f"Of the rms of what {end.name} {'is given' if given else 'puts out'} only the share "
            f"{signal / rms:.2g} differs between inputs. As many ReLUs without biases, and the "
            f"pooling, leave {floor:.2g} or more."
        )
        shares = [(_share_change(g, j), j) for j in g.scaled() if j in path[:-1]]
        culprits = _culprits(shares, -1)
        layer = g.rows[culprits[0][1]] if culprits else end
        yield Problem(layer.name, "alike", signal / rms, reason)
        return
    loss, classes = g.info.get("guess") or (0.0, 1)
    for i in ends:
        e = g.rows[i]
        limit = math.log(LOUD) + SDS * math.sqrt(g.walk(g.segment(i)))
        if e.role == "layer" and (log(e.rms) > limit or loss > math.log(classes) + LOUD):
            reason = f"Its output has an rms of {e.rms:.3g}; we allow {math.exp(limit):.3g}."
            if classes > 1:
                guess = f"a guess has ln {classes} = {math.log(classes):.3g}"
                reason += f" The loss is {loss:.3g}, where {guess}."
            yield Problem(e.name, "loud output", e.rms, reason, e.fix)
            return


def _share_change(g: Graph, i: int) -> float:
    e, end = g.rows[i], g.rows[g.end(i)]
    return log(end.signal) - log(end.rms) - log(e.in_signal) + log(e.in_rms)


def _reached(g: Graph) -> Iterator[Problem]:
    """Find a weight that the loss's data comes from, but its gradient does not come to."""
    ancestors, todo = set(), list(g.info.get("ends", ())) if g.info.get("graded") else []
    while todo:
        if (i := todo.pop()) not in ancestors and i < len(g.rows):
            ancestors.add(i)
            todo += g.rows[i].parents
    # A zero that gets a gradient wakes the zeros before it.
    wakes = any(w.grad_rms and w.mean == w.std == 0 for e in g.rows for w in e.weights)
    cut = set()  # where no other path brings the gradient, as past a quantisation
    for i in sorted(ancestors, reverse=True):
        e = g.rows[i]
        lost = bool(e.parents) and all(g.rows[p].grad_rms is None for p in e.parents)
        if (lost and e.grad_rms is not None) or i in cut:
            cut |= set(e.parents)
    for i in sorted(ancestors):
        e = g.rows[i]
        for w in e.weights:
            stuck = not wakes and w.grad_rms == 0 and w.mean == w.std == 0
            if w.trains and (stuck or (i in cut and w.grad_rms is None)):
                what = "a gradient of 0, and is 0" if stuck else "no gradient"
                reason = f"{w.names[0]} gets {what}, though the loss is computed from it."
                yield Problem(e.name, "no gradient", 0.0, reason)
                return


def _memory(g: Graph) -> Iterator[Problem]:
    """Find a recurrent layer whose last step tells nothing of its first, or too much."""
    for e in g.rows:
        if e.memory is not None and not FORGOTTEN <= e.memory <= 1 / math.sqrt(FORGOTTEN):
            change = log(e.memory)
            kind = "forgets" if change < 0 else "gradient explodes"
            reason = f"From its last step to its first a gradient {times(change)}."
            yield Problem(e.name, kind, e.memory, reason)
            return


def _backward(g: Graph) -> Iterator[Problem]:
    """Find gradients that vanish or explode on the data's path, from its end to its start."""
    for e in reversed(g.rows):
        if e.grad_rms is not None and not math.isfinite(e.grad_rms):
            reason = f"The gradient of its output has rms {e.grad_rms}."
            yield Problem(e.name, "not finite", e.grad_rms, reason)
            return
    ends = [i for i in g.ends if g.rows[i].grad_rms]
    whole = g.path(max(ends, key=lambda i: norm(g.rows[i]), default=None))
    shown = set(g.scaled())
    shown |= {i for i, e in enumerate(g.rows) if e.role == "norm" or e.op == "mul"}
    path = [i for i in whole if g.rows[i].grad_rms and i in shown]
    path = path[:-1] if len(path) > 1 and path[-1] in ends else path  # small on purpose, or not
    # Of both measures the one that has changed less: the gradient's norm, and that times the row's
    # own, which is what the loss depends on the size of a row. Layers without biases keep it.
    found = [_changes(g, path, times_size) for times_size in (False, True)]
    totals = [sum(change for change, _ in changes) for changes in found]
    total, changes = min(zip(totals, found, strict=True), key=lambda pair: abs(pair[0]))
    limit = SLACK + SDS * math.sqrt(sum(5 / (4 * g.rows[i].features) for i in path))
    growth = NORM_GROWTH * sum(g.rows[i].role == "norm" for i in path)
    if -limit <= total <= limit + growth or totals[0] * totals[1] < 0:
        return
    kind, limit = ("vanishes", -limit) if total < 0 else ("explodes", limit + growth)
    factor, row = _culprits(changes, total)[-1]
    reason = (
        f"From the last layer to the first its norm {times(total)}, through this one it "
        f"{times(factor)}; {allowed(total, limit)}."
    )
    yield Problem(g.rows[row].name, f"gradient {kind}", math.exp(total), reason, g.rows[row].fix)


def _changes(g: Graph, path: list[int], times_size: bool) -> list[tuple[float, int]]:
    """Return the logarithms of the factors by which the gradient changes, row by row."""
    changes = []
    for i, j in pairwise(path):
        before, after = g.rows[i], g.rows[j]
        change = log(norm(before)) - log(norm(after))
        pooled = log(_positions(before) / _positions(after)) / 2
        if times_size:
            change += log(before.rms * math.sqrt(math.prod(before.shape)))
            change -= log(after.rms * math.sqrt(math.prod(after.shape)))
            if pooled > 0 and after.in_rms > 0:  # what pooling averages out
                change -= max(0.0, log(before.rms) - log(after.in_rms))
        # An average over P positions divides the gradient's norm by sqrt(P), not what goes forward
        change += min(max(pooled, 0.0), max(-change, 0.0))
        if change < 0 and any(g.rows[p].op == "mul" for p in after.parents):
            change = 0.0  # all but a skip comes through a factor that is small on purpose
        changes.append((change, j))
    return changes


def _culprits(changes: Sequence[tuple[float, int]], total: float) -> list[tuple[float, int]]:
    """Return the changes in the direction of `total` that are at least half as large as the worst.

    The first of them is named: the one fault, or, where all layers share it, the first layer.
    """
    sign = math.copysign(1, total)
    worst = max((sign * change for change, _ in changes), default=0.0)
    return [c for c in changes if worst > 0 and sign * c[0] >= worst / 2]


def relu_loss(layers: int, share: float) -> float:
    """Return -log of the factor by which signal / rms falls through as many wide sound ReLU layers.

    Two inputs of cosine cos t have, after such a layer, the cosine (sin t + (pi - t) cos t) / pi
    (Cho & Saul 2009, Kernel methods for deep learning), and 1 - cosine is (signal / rms)^2.
    """
    cosine = 1 - share**2
    for _ in range(layers):
        t = math.acos(min(cosine, 1.0))
        cosine = (math.sin(t) + (math.pi - t) * math.cos(t)) / math.pi
    return log(share) - log(1 - cosine) / 2


def _same(rows: Rows) -> bool:
    """Whether all inputs are the same."""
    return all(e.in_signal == 0 for e in rows if not e.parents)


def _shape(e: LayerTrace) -> tuple:
    """Return what layers have in common whose weights are drawn on one scale."""
    return e.op, tuple((w.numel, w.fan_in) for w in e.weights)


def _share(g: Graph) -> float:
    """Return signal / rms of the input; 1 if that is not known, as of tokens."""
    first = next((e for e in g.rows if not e.parents and e.in_rms > 0), None)
    share = first.in_signal / first.in_rms if first else 1.0
    return min(share, 1.0) if share > 0 else 1.0


def norm(e: LayerTrace) -> float:
    """Return the norm of the gradient: a layer multiplies it as it multiplies the rms forward."""
    return (e.grad_rms or 0.0) * math.sqrt(math.prod(e.shape))


def _positions(e: LayerTrace) -> float:
    return max(1.0, math.prod(e.shape[1:]) / e.features)


def _rounded(e: LayerTrace) -> bool:
    return e.rms == 0 or _still(e.signal, e.rms)


def _still(signal: float, rms: float) -> bool:
    """Whether there is no signal but rounding; not for one input, whose signal is nan."""
    return signal == 0 or signal < ROUNDING * rms


def log(number: float) -> float:
    return math.log(max(number, 1e-300)) if number == number else 0.0


def times(change: float) -> str:
    """Say in words what adding `change` to a logarithm does."""
    return f"{'falls' if change < 0 else 'grows'} {math.exp(abs(change)):.3g}-fold"


def allowed(change: float, limit: float) -> str:
    """Say in words how far a limit is passed."""
    just = ", just beyond what we allow" if abs(change) < abs(limit) + math.log(1.5) else ""
    return f"we allow {math.exp(abs(limit)):.3g}{just}"
