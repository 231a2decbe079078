"""What the record of the training experiment shows, by exact tests.

Arms are selected by all fields of `Run`: what is not named has its default, so that the rows of
later experiments in the same file never slip in.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from initlab.training.plan import CHAINS, arms_of, causes, kaiming, network
from initlab.training.record import CHANCE, LOOKS, RUN, Run

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Exact:
    """The permutation test of a mean difference, by all rearrangements, for every assumed truth.

    A rearrangement is as far out as what was seen, for a true difference d, if d is on one side of
    the mean difference of what it moves: so `moved`, sorted, gives all p-values and the interval.
    What is closer than `tie` is equal but for rounding. A d other than 0 shifts all values alike.
    """

    difference: float
    moved: Array
    tie: float

    def _sides(self, d: float) -> tuple[float, float]:
        """Return the p-values of a true difference of d or less, and of d or more."""
        less = 1 + np.searchsorted(self.moved, d + self.tie, "right")
        more = 1 + len(self.moved) - np.searchsorted(self.moved, d - self.tie)
        return less / (1 + len(self.moved)), more / (1 + len(self.moved))

    def p(self, d: float = 0.0) -> float:
        """Return the two-sided p-value of a true difference d: twice the smaller side's."""
        return float(min(1.0, 2 * min(self._sides(d))))

    def p_equal(self, margin: float) -> float:
        """Return the p-value of a true difference of `margin` or more, up or down."""
        return float(max(self._sides(-margin)[0], self._sides(margin)[1]))

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the range of all d whose p-value is above 1 - `confidence`."""
        out = math.floor((1 + len(self.moved)) * (1 - confidence) / 2 + 1e-9)
        return (self.moved[out - 1], self.moved[-out]) if out else (-math.inf, math.inf)


def unpaired(a: ArrayLike, b: ArrayLike) -> Exact:
    """Test the difference of the means, b - a, of values of shapes `(n,)` and `(m,)`.

    Of 0 and 1, in equal numbers, this is Fisher's exact test, of ranks Mann and Whitney's. Raises
    a ValueError for infinite values, and more rearrangements than the 12,870 of 8 and 8.

    Source: E. Pitman 1937; for the interval P. Garthwaite 1996.

    Example:
        >>> unpaired(range(8), range(10, 18)).p() == 2 / 12870
        True
    """
    a, b = _finite(a), _finite(b)
    if math.comb(len(a) + len(b), len(b)) > math.comb(16, 8):
        raise ValueError(f"no exact test of {len(a)} and {len(b)} values: too many")
    values, taken = np.concatenate([a, b]), _choices(len(a), len(b))
    moved = np.sort((b.sum() - taken @ values) / taken[:, : len(a)].sum(1))
    return Exact(b.mean() - a.mean(), moved, 1e-12 * abs(values).max())


@cache
def _choices(n: int, m: int) -> Array:
    """Return all choices of m of n + m values, but for the last m, as rows of 0 and 1."""
    taken = np.zeros((math.comb(n + m, m), n + m))
    np.put_along_axis(taken, np.array([*itertools.combinations(range(n + m), m)]), 1, 1)
    return taken[:-1]


def _finite(values: ArrayLike) -> Array:
    values = np.asarray(values, float)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"no exact test of {values}")
    return values


def paired(d: ArrayLike) -> Exact:
    """Test the mean of at most 14 differences, shape `(n,)`, by all 2^n choices of their signs.

    Of -1, 0 and 1, which say who changed sides, this is McNemar's exact test. Raises a ValueError
    for infinite values, none, or more.

    Example:
        >>> paired(range(1, 9)).p() == 2 / 256
        True
    """
    d = _finite(d)
    if len(d) > 14:
        raise ValueError(f"no exact test of {len(d)} differences: too many")
    flipped = np.array([*itertools.product((0, 1), repeat=len(d))])[1:]
    return Exact(d.mean(), np.sort(flipped @ d / flipped.sum(1)), 1e-12 * abs(d).max())


def holm(p: ArrayLike) -> Array:
    """Return p-values, shape `(n,)`, raised for n comparisons by the rule of S. Holm 1979.

    Example:
        >>> holm([0.01, 0.5, 0.02]).round(6).tolist()
        [0.03, 0.5, 0.04]
    """
    order = np.argsort(p)
    raised = np.asarray(p, float)[order] * np.arange(len(order), 0, -1)
    return np.maximum.accumulate(raised).clip(max=1)[np.argsort(order)]


def rank_correlation(x: ArrayLike, y: ArrayLike, rounds: int = 9999) -> tuple[float, float]:
    """Return Spearman's correlation within rows, pooled, and its two-sided p-value.

    Both have shape `(rows, n)`. The p-value is of random permutations within rows, from a fixed
    seed: its standard error is sqrt(p (1 - p) / rounds). A row that is constant in x or y is left
    out; (nan, 1) if all are.

    Example:
        >>> rank_correlation([range(20)], [range(20, 0, -1)])
        (-1.0, 0.0001)
    """
    x, y = (pd.DataFrame(z).rank(axis=1).to_numpy() - (np.shape(z)[1] + 1) / 2 for z in (x, y))
    told, rng = x.any(1) & y.any(1), np.random.default_rng(0)
    x, y = x[told], y[told]
    size, seen = math.sqrt((x**2).sum() * (y**2).sum()), (x * y).sum()
    others = np.array([(x * rng.permuted(y, axis=1)).sum() for _ in range(rounds)])
    p = (1 + (abs(others) >= abs(seen) - 1e-9).sum()) / (1 + rounds)
    return float(seen / size) if size else math.nan, float(p)


# ---- The arms


def _final(*names: str) -> dict[str, Run]:
    return {name: replace(network(name), stage="final") for name in names}


_WAYS = ("", ", Adam", ", BatchNorm", ", BatchNorm, Adam")
# The declared family: every network of the first record, here with the default
FAMILY = _final(
    *(f"{depth} layers{way}" for way in _WAYS for depth in (2, 4, 8, 16)),
    *(
        f"8 layers, {kind}{way}"
        for kind in ("GroupNorm", "residual", "residual, zeroed", "Linear")
        for way in _WAYS[:2]
    ),
    *("8 layers, slope 0.3", "8 layers, 32 channels"),
)
# And those of the second record, declared before all but its first parts: 21, and 26 remedies.
# Those never run are left out here, but count in the corrections
PLANNED = {"second": 21, "remedies": 26}
SECOND = _final(
    *(f"{depth} layers, AdamW" for depth in (4, 8, 16, 30)),
    *("8 layers, warm-up", "8 layers, clipped"),
    *(f"Fashion, {depth} layers" for depth in (4, 8, 16)),
)
# Each remedy of the second record, against leaving it: the two arms
REMEDIES = {
    f"{name}: {word}": tuple(replace(arm, stage="final") for arm in pair)
    for name, *words in CHAINS
    for word, pair in zip(words, itertools.pairwise(arms_of([name, *words])), strict=True)
}


def select(record: pd.DataFrame, arm: Run) -> pd.DataFrame:
    """Return the rows with all settings of `arm` but its rate and seed, sorted by these.

    Raises a ValueError if there are none, or several final ones of a seed.
    """
    same = [record[name] == getattr(arm, name) for name in RUN if name not in ("rate", "seed")]
    rows = record[np.logical_and.reduce(same)]
    if rows.empty or (arm.stage == "final" and rows["seed"].duplicated().any()):
        raise ValueError(f"none, or several of a seed, of {arm}")
    return rows.sort_values(["rate", "seed"])


def steps(rows: pd.DataFrame) -> Array:
    """Return the first steps with 90 %, inf for a run that did not come there."""
    return rows["step_90"].astype(float).fillna(math.inf).to_numpy()


# ---- What the record shows


def compare(
    record: pd.DataFrame,
    family: Mapping[str, Run | tuple[Run, Run]] = FAMILY,
    margin: float = 0.01,
    confidence: float = 0.95,
    planned: int = 0,
) -> pd.DataFrame:
    """Compare the default with Kaiming's init in each network of a family, one row each.

    Or two arms, where the family names both: then "default" is the first, "Kaiming" the second.
    The intervals suppose that one init shifts what the other gives; the p-values suppose nothing.
    The columns: "rate" and "Kaiming rate", each the best; "default" and "Kaiming", mean test
    accuracies, "from", "to" of their difference, Kaiming minus default, its exact "p", and that
    raised, "holm"; "came" and "Kaiming came", runs that came to 90 %, and Fisher's p of these;
    "p equal" of a difference of `margin` or more, raised; "ratio" of the steps to 90 %, default by
    Kaiming, the geometric mean over the seeds ("pairs") with which both came, its "slow from",
    "slow to"; "p time" of the ranks of the steps, raised, where runs that did not come share the
    last place; "outcome": "equal" if "p equal" is below 1 - `confidence`, else "differ" if "holm"
    is, else "undecided". Raised is for all comparisons of the family, or the number `planned` if
    some of them were never run.
    """
    found = {}
    for name, arms in family.items():
        one, other = (arms, kaiming(arms)) if isinstance(arms, Run) else arms
        one, other = select(record, one), select(record, other)
        if one["seed"].tolist() != other["seed"].tolist():
            raise ValueError(f"{name}: the two inits have other seeds")
        ends = [rows["test_accuracy"].to_numpy() for rows in (one, other)]
        times, test = np.stack([steps(one), steps(other)]), unpaired(*ends)
        came, ratio = np.isfinite(times), (math.nan,) * 3
        both, places = came.all(0), pd.Series(times.ravel()).rank().to_numpy().reshape(2, -1)
        if both.any():
            logs = paired(np.log(times[0, both] / times[1, both]))
            ratio = np.exp([logs.difference, *logs.interval(confidence)])
        found[name] = (
            *(one["rate"].iloc[0], other["rate"].iloc[0], *map(np.mean, ends)),
            *(*test.interval(confidence), test.p(), test.p(), *came.sum(1), unpaired(*came).p()),
            *(test.p_equal(margin), both.sum(), *ratio, unpaired(*places).p()),
        )
    columns = "rate,Kaiming rate,default,Kaiming,from,to,p,holm,came,Kaiming came,fisher,p equal"
    columns = [*columns.split(","), "pairs", "ratio", "slow from", "slow to", "p time"]
    table = pd.DataFrame.from_dict(found, orient="index", columns=columns)
    for column in ("holm", "p equal", "p time"):
        missing = [1.0] * (planned - len(table))
        table[column] = holm([*table[column], *missing])[: len(table)]
    differ = np.where(table["holm"] < 1 - confidence, "differ", "undecided")
    return table.assign(outcome=np.where(table["p equal"] < 1 - confidence, "equal", differ))


def multiplied(record: pd.DataFrame, depth: int, same_rate: bool = False) -> pd.DataFrame:
    """Compare nets with the same nets whose weights are sqrt(6) times larger, seed by seed.

    A seed draws the same weights with n Var(w) = 1/3 and 2, up to that factor, the same biases and
    the same order of pictures. Paired are the final runs, each arm's at its own rate, or, if
    `same_rate`, all runs of three epochs at one rate. A row a shape and bias, and "all": how many
    "pairs", how many came to 90 % with "1/3", with "2", only with 2 ("gained"), only with 1/3
    ("lost"), and the exact "p" of each seed's gains less losses, McNemar's if it has one pair.
    """
    on, stage = (["rate", "seed"], "any") if same_rate else (["seed"], "final")
    rows = record.assign(stage=stage) if same_rate else record
    arms, pairs = causes(Run(stage=stage, depth=depth)), {}
    for name in [*arms][:4]:
        both = (select(rows, arms[n]).set_index(on) for n in (name, name.replace("1/3", "2")))
        came = [arm["step_90"].notna().astype(int) for arm in both]
        pairs[name[5:]] = pd.concat(came, axis=1, join="inner", keys=["1/3", "2"])
    counts = {}
    for name, came in (pairs | {"all": pd.concat(pairs.values())}).items():
        change = came["2"] - came["1/3"]
        moved = (change > 0).sum(), (change < 0).sum()
        p = paired(change.groupby("seed").sum()).p()
        counts[name] = [len(came), *came.sum(), *moved, p]
    columns = ["pairs", "1/3", "2", "gained", "lost", "p"]
    return pd.DataFrame.from_dict(counts, orient="index", columns=columns)


def signal_and_time(record: pd.DataFrame, line: float = 1e-3) -> pd.DataFrame:
    """Correlate the signal before the first step with the steps to 90 %, by ranks.

    Of all plain arms with SGD and without a norm: over arms the medians of their final runs, within
    arms the seeds. `line` parts the arms by their median signal; 0.001 was chosen when the runs had
    been seen. Where "rho" is below 0, less signal comes later; p as in `rank_correlation`.
    """
    plain = [*list(FAMILY.values())[:4], *list(FAMILY.values())[-2:]]
    more = [a for depth in (8, 16) for a in causes(Run(stage="final", depth=depth)).values()]
    runs = [select(record, arm) for arm in dict.fromkeys([*plain, *map(kaiming, plain), *more])]
    x, y = np.stack([rows["signal"] for rows in runs]), np.stack([*map(steps, runs)])
    middle, late, found = np.median(x, 1), np.median(y, 1), {}
    low = middle < line
    for where, some in (("all", low | ~low), ("above", ~low), ("below", low)):
        found[f"over arms, {where}"] = some.sum(), *rank_correlation([middle[some]], [late[some]])
        found[f"within arms, {where}"] = some.sum(), *rank_correlation(x[some], y[some])
    return pd.DataFrame.from_dict(found, orient="index", columns=["arms", "rho", "p"])


def died(record: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that had left chance and fell back to it, with finite losses.

    Left means: above 0.13 of the 2,000 pictures after 100 steps or more (one digit is 0.11 of them
    at most), or above 0.2 at any look. Looks are at powers of two: more may have left in between.
    """
    limits = [0.13 if step >= 100 else CHANCE for step in LOOKS]
    left = (record[[f"valid_{step}" for step in LOOKS]] > limits).any(axis=1)
    return record[left & (record["valid_accuracy"] < CHANCE) & ~record["diverged"]]
