"""The exact tests against scipy, brute force and planted data; the tables on planted records."""

import itertools
import math
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from initlab.training.plan import PARTS
from initlab.training.record import COLUMNS, RUN, Run
from initlab.training.run import build
from initlab.training.statistics import (
    FAMILY,
    REMEDIES,
    SECOND,
    causes,
    compare,
    died,
    holm,
    kaiming,
    multiplied,
    paired,
    rank_correlation,
    select,
    signal_and_time,
    steps,
    unpaired,
)

FINAL, DEEP = Run(stage="final"), Run(stage="final", depth=16)

SIZES = [(2, 2), (2, 6), (3, 5), (5, 3), (6, 6), (8, 8)]


def values(seed, *sizes, kind="normal"):
    """Draw values: smooth ones, small integers (many ties), or learned and not learned."""
    rng = np.random.default_rng(seed)
    if kind == "ties":
        return [rng.integers(0, 4, n).astype(float) for n in sizes]
    if kind == "humps":
        return [np.where(rng.random(n) < 0.5, 0.1135, rng.normal(0.97, 0.01, n)) for n in sizes]
    return [rng.normal(size=n) for n in sizes]


def difference(a, b, axis=0):
    return np.mean(b, axis) - np.mean(a, axis)


def scipys(a, b, alternative="two-sided"):
    n = {"n_resamples": np.inf, "vectorized": True, "alternative": alternative}
    return stats.permutation_test((a, b), difference, **n).pvalue


# ---- Exact tests


@pytest.mark.parametrize("kind", ["normal", "ties", "humps"])
@pytest.mark.parametrize("sizes", SIZES)
def test_unpaired_is_scipys(sizes, kind):
    a, b = values(sum(sizes), *sizes, kind=kind)
    assert unpaired(a, b).difference == pytest.approx(difference(a, b))
    assert unpaired(a, b).p() == pytest.approx(scipys(a, b), rel=1e-12)
    margin = 0.5  # which meets ties among small integers
    low, high = scipys(a - margin, b, "greater"), scipys(a + margin, b, "less")
    assert unpaired(a, b).p_equal(margin) == pytest.approx(max(low, high), rel=1e-12)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("kind", ["normal", "humps"])
@pytest.mark.parametrize("sizes", SIZES[2:])
def test_interval_ends_where_scipys_p_does(sizes, kind, confidence):
    a, b = values(10 + sum(sizes), *sizes, kind=kind)
    for end, outward in zip(unpaired(a, b).interval(confidence), (-1e-9, 1e-9), strict=True):
        if math.isinf(end):  # even the largest shift leaves the smallest p-value there is
            assert 2 / math.comb(sum(sizes), sizes[0]) > 1 - confidence
        else:
            assert scipys(a + end - outward, b) > 1 - confidence + 1e-12
            assert scipys(a + end + outward, b) <= 1 - confidence + 1e-12


def test_ties_are_seen_in_spite_of_rounding():
    for seed in range(30):
        a, b = values(seed, 5, 6, kind="ties")
        whole, tenths = unpaired(a, b), unpaired(a / 10 + 0.3, b / 10 + 0.3)
        assert whole.p() == tenths.p()
        for margin in (1, 2):
            assert whole.p_equal(margin) == tenths.p_equal(margin / 10)


def test_too_few_for_an_interval():
    assert unpaired([1, 2], [4, 8]).interval() == (-math.inf, math.inf)
    assert paired([1, 2, 3, 4, 5]).interval() == (-math.inf, math.inf)
    assert paired([1, 2, 3, 4, 5, 6]).interval() == (1, 6)


def test_interval_of_equal_numbers_is_of_the_equal_claim_too():
    # Two one-sided tests at 5 % are an interval of 90 % within the margin
    for seed in range(20):
        test = unpaired(*values(seed, 6, 6))
        low, high = test.interval(0.9)
        margin = max(-low, high)
        assert test.p_equal(margin + 1e-9) <= 0.05 < test.p_equal(margin - 1e-9)


def test_of_zeros_and_ones_it_is_fishers():
    for a, b in itertools.product(range(9), repeat=2):
        ones = [np.arange(8) < number for number in (a, b)]
        expected = stats.fisher_exact([[a, 8 - a], [b, 8 - b]]).pvalue
        assert unpaired(*ones).p() == pytest.approx(expected, rel=1e-9)


def test_of_ranks_it_is_mann_and_whitneys():
    a, b = values(3, 7, 8)
    places = stats.rankdata([*a, *b])
    expected = stats.mannwhitneyu(a, b, method="exact").pvalue
    assert unpaired(places[:7], places[7:]).p() == pytest.approx(expected, rel=1e-12)


def test_runs_that_never_came_count_as_the_latest():
    one, other = [np.inf, 300, np.inf, 500], [100, 200, 400, np.inf]
    method = stats.PermutationMethod(n_resamples=math.inf)  # exact, with ties
    expected = stats.mannwhitneyu(
        np.nan_to_num(one, posinf=1e6), np.nan_to_num(other, posinf=1e6), method=method
    )
    places = stats.rankdata([*one, *other])
    assert unpaired(places[:4], places[4:]).p() == pytest.approx(expected.pvalue, rel=1e-12)


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("n", [2, 4, 8, 12])
def test_paired_is_scipys(n, kind):
    a, b = values(n, n, n, kind=kind)
    n_all = {"n_resamples": np.inf, "permutation_type": "samples", "vectorized": True}
    expected = stats.permutation_test((b - a,), np.mean, **n_all).pvalue
    assert paired(b - a).p() == pytest.approx(expected, rel=1e-12)
    for end, outward in zip(paired(b - a).interval(0.5), (-1e-9, 1e-9), strict=True):
        assert paired(b - a - end + outward).p() > 0.5 >= paired(b - a - end - outward).p()


@pytest.mark.parametrize(("gained", "lost", "same"), [(7, 0, 1), (6, 2, 0), (3, 3, 4), (0, 1, 9)])
def test_paired_changes_of_sides_are_mcnemars(gained, lost, same):
    expected = stats.binomtest(gained, gained + lost).pvalue
    assert paired([1] * gained + [-1] * lost + [0] * same).p() == pytest.approx(expected)


@pytest.mark.parametrize("bad", [([], [1]), ([1], []), ([1, math.nan], [2]), ([0] * 8, [1] * 9)])
def test_what_has_no_exact_test(bad):
    with pytest.raises(ValueError, match="no exact test"):
        unpaired(*bad)


@pytest.mark.parametrize("bad", [[], [math.inf, 1], range(15)])
def test_what_has_no_paired_test(bad):
    with pytest.raises(ValueError, match="no exact test"):
        paired(bad)


def test_holm_is_bonferroni_over_every_subset():
    p = np.random.default_rng(0).random(7) ** 3
    subsets = [s for n in range(1, 8) for s in itertools.combinations(range(7), n)]
    raised = [max(min(1, len(s) * p[[*s]].min()) for s in subsets if i in s) for i in range(7)]
    np.testing.assert_allclose(holm(p), raised, rtol=1e-12)
    assert holm([0.02, 0.02]).tolist() == [0.04, 0.04]


def test_rank_correlation_of_one_row_is_spearmans():
    x, y = values(0, 6, 6, kind="ties")
    rho, p = rank_correlation([x], [y])
    assert rho == pytest.approx(stats.spearmanr(x, y).statistic)
    every = [stats.spearmanr(x, other).statistic for other in itertools.permutations(y)]
    exact = np.mean(np.abs(every) >= abs(rho) - 1e-9)
    assert abs(p - exact) < 4 * math.sqrt(exact * (1 - exact) / 9999) + 1e-4


def test_rank_correlation_permutes_within_rows_alone():
    x = np.array([[1, 2, 3, 4], [11, 12, 13, 14], [5, 5, 5, 5]])
    rho, p = rank_correlation(x, x)
    assert rho == pytest.approx(1)
    exact = 2 / 24**2  # both rows in order, or both reversed; the constant one says nothing
    assert abs(p - exact) < 4 * math.sqrt(exact / 9999) + 1e-4
    # Over rows y rises with x, within rows it falls
    rho, _ = rank_correlation(x[:2], x[:2, ::-1])
    assert rho == pytest.approx(-1)
    assert np.isnan(rank_correlation(x[2:], x[:1])[0])
    assert rank_correlation(x[2:], x[:1])[1] == 1


# ---- Planted data: found, and not found, as often as promised


def within(hits, n, p):
    """Tell whether `hits` of n is what a chance of p gives but for once in 10,000."""
    return stats.binom.ppf(5e-5, n, p) <= hits <= stats.binom.ppf(1 - 5e-5, n, p)


def test_no_difference_is_found_as_often_as_promised():
    n = 1000
    tests = [unpaired(*values(seed, 8, 8)) for seed in range(n)]
    size = 2 * math.floor(0.05 * 12870 / 2) / 12870  # the largest p-value of at most 0.05
    assert within(sum(test.p() <= 0.05 for test in tests), n, size)
    outside = sum(not low <= 0 <= high for low, high in (t.interval() for t in tests))
    assert within(outside, n, size)
    p = np.array([test.p() for test in tests]).reshape(-1, 10)
    families = sum(holm(row).min() <= 0.05 for row in p)  # ten true hypotheses each
    assert families <= stats.binom.ppf(1 - 1e-4, len(p), 0.05)


def test_no_difference_of_two_humps_is_not_found_more_often():
    n = 500
    hits = sum(unpaired(*values(s, 8, 8, kind="humps")).p() <= 0.05 for s in range(n))
    assert hits <= stats.binom.ppf(1 - 1e-4, n, 0.05)


def test_a_planted_difference_is_found_and_lies_in_the_interval():
    n, planted = 400, 1.5
    tests = [unpaired(a, b + planted) for a, b in (values(seed, 8, 8) for seed in range(n))]
    covered = [low <= planted <= high for low, high in (test.interval() for test in tests)]
    assert within(sum(covered), n, 1 - 2 * math.floor(0.05 * 12870 / 2) / 12870)
    # Student's test has a power of 0.80 here; that of the exact one is asymptotically the same
    noncentral = planted / math.sqrt(2 / 8)
    t = stats.t.ppf(0.975, 14)
    power = stats.nct.sf(t, 14, noncentral) + stats.nct.cdf(-t, 14, noncentral)
    found = sum(test.p() <= 0.05 for test in tests)
    assert within(found, n, power)
    assert all(unpaired(a, b + 10).p() == 2 / 12870 for a, b in [values(1, 8, 8)])


def test_equal_is_said_as_often_as_promised():
    n, margin = 600, 1.0
    data = [values(seed, 8, 8) for seed in range(n)]
    # The truth at the margin: then equal is a mistake. Twice as precise, it is as often made as
    # promised; as they are, the other side may forbid it
    wrong = [
        sum(unpaired(sd * a, sd * b + margin).p_equal(margin) <= 0.05 for a, b in data)
        for sd in (0.5, 1)
    ]
    assert within(wrong[0], n, math.floor(0.05 * 12870) / 12870)
    assert wrong[1] <= wrong[0]
    assert all(unpaired(0.1 * a, 0.1 * b).p_equal(margin) < 0.001 for a, b in data[:50])


def test_unrelated_ranks_are_found_as_often_as_promised():
    n, rounds = 300, 199
    draw = np.random.default_rng(5).normal
    p = [rank_correlation(draw(size=(3, 6)), draw(size=(3, 6)), rounds)[1] for _ in range(n)]
    assert within(sum(value <= 0.05 for value in p), n, 0.05)


# ---- Planted records


def record(*groups):
    """Return a record of groups (arm, results by column), one row a seed."""
    rows = []
    for arm, results in groups:
        n = max(len(values) for values in results.values())
        for number in range(n):
            first = 0 if arm.stage == "tune" else 10
            row = asdict(replace(arm, seed=first + number)) | dict.fromkeys(COLUMNS[len(RUN) :])
            row |= {"diverged": False, "signal": 0.1, "valid_accuracy": 0.97, "test_accuracy": 0.97}
            rows.append(row | {column: cells[number] for column, cells in results.items()})
    return pd.DataFrame(rows, columns=COLUMNS).astype(
        {"step_90": "Int64"} | {c: float for c in COLUMNS if c.startswith(("loss_", "valid_"))}
    )


def ends(mean, sd=0.002, n=8):
    """Return accuracies of exactly this mean, spread evenly."""
    return mean + sd * np.linspace(-1.5, 1.5, n)


NET = Run(stage="final")
NEVER = [None] * 8
PLANTED = {
    "same": (Run(stage="final", depth=2), (0.97, 0.971), [[300] * 8, [150] * 8]),
    "apart": (Run(stage="final", depth=4), (0.5, 0.97), [NEVER, [150] * 8]),
    "open": (Run(stage="final", depth=8), (0.965, 0.97), [[300] * 6 + [None] * 2, [200] * 8]),
}
SPREAD = {"same": 0.002, "apart": 0.05, "open": 0.01}


def planted():
    return record(
        *(
            (arm, {"test_accuracy": ends(mean, SPREAD[name]), "step_90": step})
            for name, (network, means, times) in PLANTED.items()
            for arm, mean, step in zip((network, kaiming(network)), means, times, strict=True)
        )
    )


def test_compare_finds_what_was_planted():
    family = {name: network for name, (network, *_) in PLANTED.items()}
    table = compare(planted(), family)
    assert table["outcome"].to_dict() == {"same": "equal", "apart": "differ", "open": "undecided"}
    np.testing.assert_allclose(table["default"], [0.97, 0.5, 0.965])
    np.testing.assert_allclose(table["Kaiming"], [0.971, 0.97, 0.97])
    assert table["came"].tolist() == [8, 0, 6]
    assert table["Kaiming came"].tolist() == [8, 8, 8]
    fishers = [1, 2 / 12870, stats.fisher_exact([[6, 2], [8, 0]]).pvalue]
    np.testing.assert_allclose(table["fisher"], fishers)
    np.testing.assert_allclose(table["ratio"], [2, math.nan, 1.5])
    np.testing.assert_allclose(table["slow from"], [2, math.nan, 1.5])
    assert table["pairs"].tolist() == [8, 0, 6]
    assert table["p"]["apart"] == 2 / 12870
    np.testing.assert_allclose(table["holm"], holm(table["p"]))
    # All three by rank alone: one init always first, or ties at the end only
    np.testing.assert_allclose(table["p time"], [6 / 12870] * 3)


def test_a_sure_but_small_difference_is_called_equal():
    groups = [(NET, ends(0.97, 2e-4)), (kaiming(NET), ends(0.973, 2e-4))]
    rows = record(*((arm, {"test_accuracy": end, "step_90": [200] * 8}) for arm, end in groups))
    row = compare(rows, {"small": NET}).loc["small"]
    assert row["holm"] == 2 / 12870
    assert row["outcome"] == "equal"


def test_margin_and_confidence():
    family = {name: network for name, (network, *_) in PLANTED.items()}
    assert compare(planted(), family, margin=0.03)["outcome"]["open"] == "equal"
    narrow, wide = (compare(planted(), family, confidence=c) for c in (0.5, 0.95))
    assert (narrow["from"] > wide["from"]).all()
    assert (narrow["to"] < wide["to"]).all()


def other_than(value):
    if isinstance(value, bool):
        return not value
    return value + "x" if isinstance(value, str) else min(2 * value + 1, 1e9)


def test_rows_with_any_other_setting_never_slip_in():
    family = {name: network for name, (network, *_) in PLANTED.items()}
    rows, others = planted(), []
    for field in set(RUN) - {"rate", "seed"}:
        more = rows.assign(test_accuracy=0.2, step_90=25)
        more[field] = [other_than(value) for value in more[field].tolist()]
        others += [more, more.assign(rate=0.5)]
    all_of_them = pd.concat([*others[::2], rows, *others[1::2]], ignore_index=True)
    pd.testing.assert_frame_equal(compare(all_of_them, family), compare(rows, family))


def test_an_arm_that_is_missing_or_stands_there_twice():
    rows = planted()
    with pytest.raises(ValueError, match="none, or several"):
        compare(rows[rows["scheme"] == "default"], {"same": PLANTED["same"][0]})
    with pytest.raises(ValueError, match="none, or several"):
        select(pd.concat([rows, rows.assign(rate=0.5)]), PLANTED["same"][0])
    with pytest.raises(ValueError, match="other seeds"):
        compare(rows.iloc[1:], {"same": PLANTED["same"][0]})


def test_steps_and_order():
    rows = planted().iloc[::-1]
    chosen = select(rows, PLANTED["open"][0])
    assert chosen["seed"].tolist() == list(range(10, 18))
    assert steps(chosen).tolist() == [300] * 6 + [math.inf] * 2


@pytest.mark.parametrize("name", [name for name in causes(FINAL) if name.startswith("1/3")])
def test_a_seed_draws_the_same_weights_but_for_sqrt_6(name):
    arms = causes(replace(FINAL, depth=3))
    small, large = (build(replace(arms[n], seed=12)) for n in (name, name.replace("1/3", "2")))
    layers = [
        [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)] for net in (small, large)
    ]
    for one, other in zip(*layers, strict=True):
        torch.testing.assert_close(math.sqrt(6) * one.weight, other.weight)
        assert torch.equal(one.bias, other.bias)
    assert len(layers[0]) == 4


def test_every_comparison_of_the_second_record_is_planned():
    arms = {replace(arm, stage="final") for part in PARTS for arm in part}
    both = {arm for one in SECOND.values() for arm in (one, kaiming(one))}
    assert both <= arms
    remedies = {arm for pair in REMEDIES.values() for arm in pair}
    assert remedies <= arms
    second = {replace(a, stage="final") for p in PARTS[18:] for a in p if a.stage == "tune"}
    assert second <= both | remedies
    assert (len(SECOND), len(REMEDIES)) == (9, 20)


def test_multiplied_counts_who_changes_sides():
    came, never = [300] * 8, NEVER
    steps_of = {
        "uniform, default": (never, came),
        "uniform, zeros": (came, [300] * 7 + [None]),
        "normal, default": (came, came),
        "normal, zeros": ([300] + [None] * 7, [None] + [300] * 7),
    }
    arms = causes(FINAL)
    groups = [
        (arms[f"{n_var}, {name}"], {"step_90": step})
        for name, both in steps_of.items()
        for n_var, step in zip(("1/3", "2"), both, strict=True)
    ]
    table = multiplied(record(*groups), 8)
    assert table[["gained", "lost"]].to_numpy().tolist()[:4] == [[8, 0], [0, 1], [0, 0], [7, 1]]
    assert table.loc["all", ["pairs", "1/3", "2", "gained", "lost"]].tolist() == [32, 17, 30, 15, 2]
    expected = [2 / 256, 1, 1, stats.binomtest(7, 8).pvalue]
    np.testing.assert_allclose(table["p"][:4], expected)
    # Seed by seed: +1 - 1 = 0, six times +2, and 2 - 1 = 1
    np.testing.assert_allclose(table["p"]["all"], 2 / 2**7)


def test_multiplied_at_one_rate_pairs_rates_and_stages():
    arms, groups = causes(FINAL), []
    for name in [*arms][:8]:
        came = [300, 300] if name.startswith("2") else [None, None]
        for stage, rate in (("tune", 0.01), ("tune", 0.1), ("final", 0.01), ("given", 0.3)):
            if not (name == "2, normal, zeros" and rate == 0.1):
                arm = replace(arms[name], stage=stage, rate=rate)
                groups.append((arm, {"step_90": came}))
        groups.append((replace(arm, rate=1.0, steps=7800), {"step_90": came}))  # no such run
    table = multiplied(record(*groups), 8, same_rate=True)
    # Two seeds each, tuned at two rates, final and given at one; the last init was tuned at one
    assert table["pairs"].tolist() == table["gained"].tolist() == [8, 8, 8, 6, 30]
    assert table["p"]["all"] == 2 / 2**4
    assert multiplied(record(*groups), 8)["pairs"].tolist() == [2, 2, 2, 2, 8]


def test_died():
    looks = [f"valid_{2**k}" for k in range(13)]
    curves = {
        "stuck": [0.1] * 13,
        "drawn well": [0.19] + [0.1] * 12,
        "learned early": [0.1, 0.3] + [0.1] * 11,
        "left late": [0.1] * 10 + [0.154] + [0.1] * 2,
        "learned": [0.1] * 7 + [0.5] * 6,
        "nan at the end": [0.1] * 7 + [0.5] + [math.nan] * 5,
        "diverged": [0.1] * 7 + [0.5] + [math.nan] * 5,
    }
    table = record((NET, {look: [c[k] for c in curves.values()] for k, look in enumerate(looks)}))
    table["valid_accuracy"] = [0.1064, 0.1064, 0.1064, 0.1064, 0.9, 0.1064, 0.0]
    table["diverged"] = [name == "diverged" for name in curves]
    names = np.array([*curves])[died(table).index]
    assert names.tolist() == ["learned early", "left late", "nan at the end"]


def test_signal_and_time_parts_over_and_within():
    plain = [*[*FAMILY.values()][:4], *[*FAMILY.values()][-2:]]
    arms = [*plain, *map(kaiming, plain), *causes(FINAL).values(), *causes(DEEP).values()]
    rng, groups = np.random.default_rng(0), []
    for number, arm in enumerate(dict.fromkeys(arms)):
        # Over arms the larger the earlier, within an arm the larger the later; five never came
        order = rng.permutation(8)
        signal = 10.0 ** (-0.2 * number) * (1 + 0.01 * order)
        step = [None] * 8 if number > 22 else [25 * (10 * number + 1 + k) for k in order.tolist()]
        groups.append((arm, {"signal": signal, "step_90": step}))
    table = signal_and_time(record(*groups))
    assert table["arms"].tolist() == [28, 28, 16, 16, 12, 12]
    np.testing.assert_allclose(table["rho"][["within arms, all", "within arms, above"]], 1)
    np.testing.assert_allclose(table["rho"]["over arms, above"], -1)
    assert -1 < table["rho"]["over arms, all"] < -0.9  # the five share the last place
    assert (table["p"] < 0.01).all()
