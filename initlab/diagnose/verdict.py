"""Is an init sound? What the rows of a trace say, by limits that are derived or measured.

Scales are compared along the data's own paths: each row goes on from that of its parents whose
signal is largest, and begins anew at inputs, embeddings, recurrent layers and norms.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from initlab.diagnose.rows import ADVICE, IDLE, ROUNDING, LayerTrace, Problem, Rows, some

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
# What a norm in train mode would not change
STAYS = {"not finite", "equal units", "mean", "input scale", "no gradient", "forgets"}


class Graph:
    """The rows with what follows from their parents."""

    def __init__(self, rows: Rows, info: dict[str, Any]) -> None:
        self.rows, self.info = rows, info
        self.spoiled: set[int] = set()  # not judged: they show a problem that was found before
        self.children: list[list[int]] = [[] for _ in rows]
        self.main: list[int | None] = []  # the parent with the largest signal; None at a start
        for i, e in enumerate(rows):
            for p in e.parents:
                self.children[p].append(i)
            main = max(e.parents, key=lambda p: rows[p].size, default=None)
            if main is not None:
                # What it is given comes from elsewhere: the input, or parameters
                elsewhere = e.in_rms > STREAM * rows[main].rms * len(e.parents) ** 0.5
                main = None if elsewhere or not rows[main].size else main
            self.main.append(main)
        # What the loss, or the output, is made of
        ends = [i for i in info.get("ends", ()) if i < len(rows)]
        self.ends = ends or [i for i, after in enumerate(self.children) if not after]

    def problem(self, i: int, kind: str, value: float, reason: str, *also: int) -> Problem:
        """Return a problem of row i; the rows `also` may be to blame for it."""
        idle = kind not in STAYS and any(e.idle for e in self.rows)
        draws = ADVICE[kind].startswith("Draw") and not idle  # then there is a line to paste
        fixes = [self.rows[j].fix for j in (i, *also)] if draws else []
        return Problem(self.rows[i].name, kind, value, reason, "\n".join(filter(None, fixes)), idle)

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

    def end(self, i: int) -> int:
        """Return the last of the activations (or idle norms) that follow row i directly."""
        while len(self.children[i]) == 1:
            e = self.rows[self.children[i][0]]
            # A "mul" is a factor that is small on purpose
            if e.role not in ("activation", "affine") or e.op == "mul" or len(e.parents) > 1:
                break
            (i,) = self.children[i]
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
        end = self.end(i)
        return all(self.meets(c, end) for c in self.children[end])

    def alone(self, i: int) -> bool:
        """Whether layers after row i are given nothing else, and nothing goes past it."""
        after = [(c, self.rows[c]) for c in self.children[i]]
        if not all(len(e.parents) == 1 or not e.size > 0 for _, e in after):
            return False
        return any(e.role in ("layer", "mixer") or self.alone(c) for c, e in after)

    def before(self, stops: Callable[[int, int], bool]) -> set[int]:
        """Return the rows all of whose ways end where `stops(row, the last before it)`."""
        found: set[int] = set()
        for i in reversed(range(len(self.rows))):
            after, end = self.children[self.end(i)], self.end(i)
            on = all(c in found or stops(c, end) for c in after)
            if on and i not in self.ends and end not in self.ends:
                found.add(i)
        return found

    def path(self, i: int | None, whole: bool = True) -> list[int]:
        """Return the path to row i: from its start, or since its last norm or mixer."""
        rows = []
        while i is not None and (whole or self.rows[i].role not in ("norm", "mixer")):
            rows.append(i)
            i = self.main[i]
        return rows[::-1]

    def level(self, rows: Sequence[int]) -> float:
        """Return the log of the factor by which the signal changes along a path.

        But for what falls where no weight stands, as by pooling: that is not a layer's fault.
        """
        level = 0.0
        for i in rows:
            e, main = self.rows[i], self.main[i]
            given = (e.given, math.nan if main is None else self.rows[main].size)
            if known := [size for size in given if size > 0]:
                level += log(e.size) - log(min(known))
        return level

    def spread(self, rows: Iterable[int]) -> float:
        """Return by how much that number may stray in sound nets.

        After n features of ReLUs the mean square M has, given the layer before, a relative variance
        of at most 5/n (notebook 6), so log rms makes a random walk of steps of variance 5/(4n).
        """
        layers = (e for e in (self.rows[i] for i in rows) if e.role in ("layer", "norm"))
        return SDS * math.sqrt(sum(5 / (4 * e.features) for e in layers))

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


def judge(rows: Rows, info: dict[str, Any] | None = None) -> tuple[list[Problem], set[str]]:
    """Return the problems, in the order of the layers, and the names of the parameters judged.

    What follows from a problem is not reported again: what it spoils is not judged, nor are the
    gradients, unless the forward pass is sound.
    """
    g, problems = Graph(rows, info or {}), []
    for find in (_not_finite, _weights, _dead, _constant, _input, _forward, _leaps):
        problems += find(g)
    for find in (_output, _reached, _memory, _backward):
        problems += [] if problems else find(g)
    order = {e.name: i for i, e in enumerate(rows)}
    problems.sort(key=lambda p: order[p.layer])
    shown = [e for _, e in g.live() if (e.size > 0 or e.given > 0) and not e.learned]
    shown += [rows[order[p.layer]] for p in problems]
    scales = {order[p.layer] for p in problems if p.kind in ("scale", "shrinks", "grows")}
    g.spoiled = set()
    for i in scales:
        g.spoil(i)
    told: defaultdict[str, list[Problem]] = defaultdict(list)
    for p in problems:  # units die of a scale, too
        if p.kind not in ("dead", "constant") or order[p.layer] not in g.spoiled - scales:
            told[p.kind].append(p)
    for kind, alike in told.items():  # what one rule drew is said once, a scale may be a slip
        first, more = (alike[:3], alike[3:]) if kind == "scale" else (alike[:1], alike[1:])
        if names := [p.layer for p in more]:
            reason = f"{first[-1].reason} The same holds for {some(names)}."
            first[-1] = replace(first[-1], reason=reason)
        told[kind] = first
    problems = sorted((p for alike in told.values() for p in alike), key=lambda p: order[p.layer])
    return problems, {n for e in shown for w in e.weights for n in w.names}


def remark(rows: Rows, info: dict[str, Any] | None = None) -> list[str]:
    """Return what is no fault of the init, but good to know."""
    info = info or {}
    silent = [y["rms"] for y in info.get("outputs", ()) if _still(y["signal"], y["rms"])]
    copies = defaultdict(set)
    for w in (w for e in rows for w in e.weights if w.std and not w.equal):
        copies[w.numel, w.mean, w.std].add(w.names[0])
    same = [", ".join(sorted(names)[:3]) for names in copies.values() if len(names) > 1]
    said = []
    if info.get("n") == 1:
        said.append("With one input there is no signal: only sizes were judged.")
    elif rows and _same(rows):
        said.append("All inputs are the same: there is no signal, only sizes were judged.")
    elif silent:
        said.append(f"An output is the same for all inputs, of rms {silent[0]:.3g}: no signal.")
    if info.get("trained"):
        said.append("Its norms look trained: the verdict is on an init.")
    if same:
        said.append(f"Weights that are copies of each other: {same[0]}.")
    if any(e.idle for e in rows):
        said.append(IDLE)
    return said


def _not_finite(g: Graph) -> Iterator[Problem]:
    for i, e in g.live():
        if not math.isfinite(e.rms):
            g.spoil(i, lasting=True)
            reason = f"The rms of its output is {e.rms}, that of its input {e.in_rms:.3g}."
            yield g.problem(i, "not finite", e.rms, reason)


def _weights(g: Graph) -> Iterator[Problem]:
    """Find weights whose units are all equal, but not 0: nothing tells them apart.

    And those whose mean outweighs their differences in the sum over fan_in.
    """
    for i, e in g.live():
        for w in (w for w in e.weights if w.trains and (w.mean or w.std)):
            mean = abs(w.mean) * min(w.fan_in**0.5 / 2, min(w.numel, 1 << 18) ** 0.5 / 6)
            if w.equal:
                found = "equal units", 0.0, f"All units of {w.names[0]} have the same weights."
            elif mean > w.std > 0 and e.role == "layer" and not g.info.get("trained"):
                reason = f"The mean of {w.names[0]} is {w.mean:.3g}, their std {w.std:.3g}."
                found = "mean", w.mean, reason
            else:
                continue
            g.spoil(i)
            yield g.problem(i, *found)
            break


def _dead(g: Graph) -> Iterator[Problem]:
    """Find activations with more dead features than luck explains, or with all of them dead.

    With weights and biases drawn symmetrically about 0, a feature is below 0 for all inputs as
    often as it is above 0 for all. So the dead outnumber the others of m such features by 5 sqrt(m)
    with a probability of at most exp(-5^2 / 2) = 4e-6 (Hoeffding's inequality).
    """
    for i, e in g.live():
        dead = round((e.dead or 0) * e.features)
        source = e.parents[0] if len(e.parents) == 1 else i
        luck = dead == e.features < FEW and g.children[i] and not g.alone(i)
        if not dead or luck or (source != i and g.rows[source].rms == 0):
            continue
        if dead == e.features or dead - e.above > 5 * math.sqrt(dead + e.above):
            if dead == e.features:
                g.spoil(source, lasting=True)
            reason = (
                f"Of the {e.features} features of {e.name} ({e.kind}), {dead} are 0 for all inputs "
                f"and positions, and {e.above} are never below 0; biases of 0 give as many of both."
            )
            yield g.problem(source, "dead", e.dead, reason)


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
            yield g.problem(i, "constant", e.rms, reason)


def _input(g: Graph) -> Iterator[Problem]:
    """Find inputs, and embeddings that layers are given as they are, out of scale."""
    for i, e in g.live():
        if e.role != "layer" or not e.in_rms > 0 or 1 / INPUT <= e.in_rms <= INPUT:
            continue
        picked = [p for p in e.parents if g.rows[p].role == "mixer" and not g.rows[p].in_rms > 0]
        if not e.parents and not e.learned and not g.normed(i):
            g.spoil(i)
            yield g.problem(i, "input scale", e.in_rms, f"The input has an rms of {e.in_rms:.3g}.")
        elif picked and len(picked) == len(e.parents):
            worst = max(picked, key=lambda p: abs(log(g.rows[p].rms)))
            rms = g.rows[worst].rms
            # A small one that reaches the outputs by way of norms only does no harm
            if rms > 1 or worst not in g.before(lambda c, _: g.rows[c].role == "norm"):
                g.spoil(worst)
                yield g.problem(worst, "scale", rms, f"Its output has an rms of {rms:.3g}.")


def _forward(g: Graph) -> Iterator[Problem]:
    """Find signals that shrink or grow, and layers out of scale."""
    scaled, aside = g.scaled(), g.before(g.meets)
    for i in scaled:
        if i in g.spoiled:
            continue
        end, segment = g.end(i), g.path(g.end(i), whole=False)
        on = [j for j in segment if j in scaled and j <= i]
        level, limit = g.level(segment), SLACK + g.spread(segment)
        loss = relu_loss(sum(g.rows[j].role == "activation" for j in segment), 1.0)
        begin, first = g.main[segment[0]], g.rows[segment[0]]
        normed = begin is not None
        start = g.rows[begin].rms if normed else first.in_rms
        grown = log(g.rows[end].rms) - log(start if start > 0 else first.rms)
        grown = min(grown, level + loss)
        branch = i in aside and normed and len(on) < 5
        level = grown if grown > limit else 0.0 if branch else level
        custom = LEAP + CUSTOM * (min(len(on), 3) - 1) if normed else 0.0
        low = -max(limit + LOW, custom) - loss
        if low <= level <= limit or (level < 0 and g.joined(i)):
            continue
        by = [(g.factor(j), j) for j in on if level > 0 or not g.joined(j)]
        culprits = _culprits(by, level)
        if not culprits or culprits[0][1] in g.spoiled:  # who is named already
            continue
        (factor, row), *more = culprits
        kind = "scale" if not more else "shrinks" if level < 0 else "grows"
        reason = (
            f"Over {len(on)} layer{'s' * (len(on) != 1)} the signal {times(level)}, in this one it "
            f"{times(factor)}; {allowed(level, low if level < 0 else limit)}."
        )
        value = math.exp(level if more else factor)
        yield g.problem(row, kind, value, reason, *(j for _, j in more[:1]))
        g.spoiled.add(row)
        for c in g.children[end]:  # the others are judged
            g.spoil(c)


def _leaps(g: Graph) -> Iterator[Problem]:
    """Find layers whose factor is far from that of the others."""
    alike, scaled = defaultdict(list), g.scaled()
    for i in scaled:
        alike[_shape(g.rows[i])].append(g.factor(i))
    middle = statistics.median(map(g.factor, scaled)) if len(scaled) > 2 else 0.0
    for i in scaled:
        if i in g.spoiled:
            continue
        change, same = g.factor(i), alike[_shape(g.rows[i])]
        usual, limit, what = middle, LEAP, "the median layer"
        if len(same) > 3:
            usual, what = statistics.median(same), f"the median of {len(same)} layers like it"
            limit = LIKE + g.spread([i])
        if change - usual > limit or (change - usual < -limit and not g.joined(i)):
            reason = f"The signal {times(change)} here, in {what} it {times(usual)}."
            g.spoil(i)
            yield g.problem(i, "scale", math.exp(change), reason)


def _output(g: Graph) -> Iterator[Problem]:
    """Find outputs that are alike, too large, or without the signal that the last layer has."""
    ends = [i for i in g.ends if g.rows[i].rms > 0]
    path = g.path(max(ends, default=None))
    if not path or _same(g.rows):
        return
    outputs, last = g.info.get("outputs", ()), g.rows[path[-1]]
    if not _rounded(last) and outputs and all(_still(y["signal"], y["rms"]) for y in outputs):
        reason = f"It has a signal of {last.signal:.3g}, and the output of the network has none."
        yield g.problem(path[-1], "silent output", 0.0, reason)
        return
    while len(path) > 1 and g.rows[path[-1]].role == "activation":  # they shift all outputs
        path.pop()
    end, given = g.rows[path[-1]], g.rows[path[-1]].role == "layer"
    signal, rms = (end.in_signal, end.in_rms) if given else (end.signal, end.rms)
    pooled = 0.0
    for a, b in pairwise(g.rows[i] for i in path):
        if _positions(a) > _positions(b) and a.signal > 0 and b.in_signal > 0:
            pooled += max(0.0, share(a.signal, a.rms) - share(b.in_signal, b.in_rms))
    # That of the input; 1 where it is not known, as of tokens
    known = (e for e in g.rows if not e.parents and e.in_rms > 0 and e.in_signal > 0)
    begin = next((min(share(e.in_signal, e.in_rms), 0.0) for e in known), 0.0)
    active = sum(g.rows[i].role == "activation" for i in path[:-1])
    floor = math.exp(begin - relu_loss(active, math.exp(begin)) - pooled - SLACK)
    small = any(g.rows[p].op == "mul" for j in path for p in g.rows[j].parents)  # on purpose
    if signal < floor * rms and not small:
        reason = (
            f"Of the rms of what {end.name} {'is given' if given else 'puts out'} only the share "
            f"{signal / rms:.2g} differs between inputs. As many ReLUs without biases, and the "
            f"pooling, leave {floor:.2g} or more."
        )
        changes = []
        for j in (j for j in g.scaled() if j in path[:-1]):
            e, after = g.rows[j], g.rows[g.end(j)]
            changes.append((share(after.signal, after.rms) - share(e.in_signal, e.in_rms), j))
        culprits = [j for _, j in _culprits(changes, -1)] or path[-1:]
        yield g.problem(culprits[0], "alike", signal / rms, reason)
        return
    loss, classes = g.info.get("guess") or (0.0, 1)
    for i in ends:
        e = g.rows[i]
        limit = math.log(LOUD) + g.spread(g.path(i, whole=False))
        if e.role == "layer" and (log(e.rms) > limit or loss > math.log(classes) + LOUD):
            reason = f"Its output has an rms of {e.rms:.3g}; we allow {math.exp(limit):.3g}."
            if classes > 1:
                guess = f"a guess has ln {classes} = {math.log(classes):.3g}"
                reason += f" The loss is {loss:.3g}, where {guess}."
            yield g.problem(i, "loud output", e.rms, reason)
            return


def _reached(g: Graph) -> Iterator[Problem]:
    """Find a weight that the loss's data comes from, but its gradient does not come to."""
    ancestors, todo = set(), [*g.ends] if g.info.get("graded") else []
    while todo:
        if (i := todo.pop()) not in ancestors:
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
        for w in g.rows[i].weights:
            stuck = not wakes and w.grad_rms == 0 and w.mean == w.std == 0
            if w.trains and (stuck or (i in cut and w.grad_rms is None)):
                what = "a gradient of 0, and is 0" if stuck else "no gradient"
                reason = f"{w.names[0]} gets {what}, though the loss is computed from it."
                yield g.problem(i, "no gradient", 0.0, reason)
                return


def _memory(g: Graph) -> Iterator[Problem]:
    """Find a recurrent layer whose last step tells nothing of its first, or too much."""
    for i, e in enumerate(g.rows):
        if e.memory is not None and not FORGOTTEN <= e.memory <= 1 / math.sqrt(FORGOTTEN):
            kind = "forgets" if e.memory < 1 else "gradient explodes"
            reason = f"From its last step to its first a gradient {times(log(e.memory))}."
            yield g.problem(i, kind, e.memory, reason)
            return


def _backward(g: Graph) -> Iterator[Problem]:
    """Find gradients that vanish or explode on the data's path, from its end to its start."""
    for i, e in reversed([*enumerate(g.rows)]):
        if e.grad_rms is not None and not math.isfinite(e.grad_rms):
            reason = f"The gradient of its output has rms {e.grad_rms}."
            yield g.problem(i, "not finite", e.grad_rms, reason)
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
    limit = SLACK + g.spread(path)
    growth = NORM_GROWTH * sum(g.rows[i].role == "norm" for i in path)
    if -limit <= total <= limit + growth or totals[0] * totals[1] < 0:
        return
    kind, limit = ("vanishes", -limit) if total < 0 else ("explodes", limit + growth)
    factor, row = _culprits(changes, total)[-1]
    reason = (
        f"From the last layer to the first its norm {times(total)}, through this one it "
        f"{times(factor)}; {allowed(total, limit)}."
    )
    yield g.problem(row, f"gradient {kind}", math.exp(total), reason)


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


def share(signal: float, rms: float) -> float:
    """Return the log of a signal's share of the rms."""
    return log(signal) - log(rms)


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
    near = ", a little less" if abs(change) < abs(limit) + math.log(1.5) else ""
    return f"we allow {math.exp(abs(limit)):.3g}{near}"
