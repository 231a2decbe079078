"""Which runs the experiment consists of, given what its record holds so far."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import pandas as pd
from torch import nn

from initlab.init import gain
from initlab.training.record import CHANCE, EPOCH, Run, runs_of

RATES = (3.16e-5, 1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1, 3.16e-1, 1.0, 3.16)
ADAM = (1e-3, 3.16e-3, 1e-2)
GRIDS = {"sgd": (1e-2, 3.16e-2, 1e-1), "adam": ADAM, "adamw": ADAM}
TUNE_SEEDS, FINAL_SEEDS, LATE_SEEDS = (0, 1), range(10, 18), (20, 21)
FIRST = 17  # parts of the first record
THIRD_SEED, CLOSE = 2, 0.005  # in the second record, for two best rates as close as that
MODERN = {"optimizer": "adamw", "weight_decay": 0.05, "warmup": 100, "cosine": True}
DRAWN = {"scheme": "kaiming_normal", "a": 1.0, "bias": "zeros"}  # with a gain of its own
# What the words set by which networks are called; "8 layers" sets the depth, and what begins with
# "Kaiming" Kaiming's init
WORDS: dict[str, dict[str, Any]] = {
    "Adam": {"optimizer": "adam"},
    "AdamW": MODERN,
    "BatchNorm": {"norm": "batch"},
    "frozen BatchNorm": {"norm": "frozen"},
    "GroupNorm": {"norm": "group"},
    "residual": {"net": "residual"},
    "zeroed": {"zeroed": True},
    "Linear": {"net": "linear", "width": 256},
    "slope 0.3": {"slope": 0.3},
    "32 channels": {"width": 32},
    "warm-up": {"warmup": 300},
    "clipped": {"clip": 1.0},
    "20 epochs": {"steps": 20 * EPOCH},
    "Fashion": {"data": "fashion", "goal": 0.8},
    # Remedies, and what they are tried on
    "Kaiming": {},
    "Kaiming by fan_in": {},
    "Kaiming in the convolutions": {"drawn": "convolutions"},
    "Kaiming in the last layer": {"drawn": "last"},
    "last layer times 0.1": {"last": 0.1},
    "eps 1e-12": {"eps": 1e-12},
    "LSUV": {"scheme": "lsuv", "a": 0.0, "bias": "zeros"},
    "GELU": {"act": "gelu"},
    "the ReLU's gain": DRAWN | {"gain": round(gain(0.0), 4)},
    "GELU's gain": DRAWN | {"gain": round(gain(nn.GELU()), 4)},
    "separable": {"net": "separable"},
    "by fan_out": {"mode": "fan_out"},
    "LSTM": {"net": "lstm", "width": 64, "optimizer": "adam"},
    "forget bias 1": {"forget": 1.0},
    "GPT": {"net": "gpt", "depth": 4, "width": 64, "data": "sort", "goal": 0.99, "steps": EPOCH}
    | MODERN,
    "N(0, 0.02^2)": {"scheme": "gpt2"},
    "ends of branches by 1/sqrt(2L)": {"scheme": "gpt2_scaled"},
}
# Remedies of the second record: a network, and what is changed in it, one change after the other
CHAINS = [
    *(("8 layers", f"Kaiming in the {where}") for where in ("convolutions", "last layer")),
    ("8 layers, Kaiming", "last layer times 0.1"),
    ("16 layers, Adam", "eps 1e-12"),
    *((f"{depth} layers{init}", "LSUV") for init in ("", ", Kaiming") for depth in (8, 16)),
    ("GELU", "the ReLU's gain", "GELU's gain"),
    *(
        (f"separable{norm}", "Kaiming by fan_in", "by fan_out")
        for norm in (", BatchNorm", ", frozen BatchNorm", "")
    ),
    *((f"LSTM, {steps} steps", "forget bias 1") for steps in (28, 98)),
    ("GPT", "N(0, 0.02^2)", "ends of branches by 1/sqrt(2L)"),
]


def network(name: str) -> Run:
    """Return what a name such as "16 layers, residual, Adam" says, word by word; not the rate."""
    return reduce(_changed, name.split(", "), Run())


def _changed(run: Run, word: str) -> Run:
    settings = WORDS[word] if word in WORDS else {"depth": int(word.split()[0])}
    return replace(kaiming(run) if word.startswith("Kaiming") else run, **settings)


def kaiming(network: Run) -> Run:
    """Return the same network with Kaiming's init."""
    return replace(network, scheme="kaiming_normal", a=network.slope, bias="zeros")


def causes(network: Run) -> dict[str, Run]:
    """Return a network with all inits tried, by n Var(w), shape and bias, and two others."""
    three = (("1/3", math.sqrt(5)), ("2", network.slope)), ("uniform", "normal")
    arms = {
        f"{n_var}, {shape}, {bias}": replace(network, scheme=f"kaiming_{shape}", a=a, bias=bias)
        for (n_var, a), shape, bias in itertools.product(*three, ("default", "zeros"))
    }
    arms["1/3, uniform, default"] = network  # as the record names it
    arms["Xavier"] = replace(kaiming(network), scheme="xavier_normal", a=1.0)  # torch's gain
    return arms | {"orthogonal": replace(kaiming(network), scheme="orthogonal")}


def arms_of(chain: Iterable[str]) -> list[Run]:
    """Return the network that a chain begins with, and each that it goes on to."""
    name, *words = chain
    return [*itertools.accumulate(words, _changed, initial=network(name))]


def _both(*names: str) -> list[Run]:
    """Return each network as PyTorch draws it, and with Kaiming's init."""
    return [arm for name in names for arm in (network(name), kaiming(network(name)))]


def _given(arm: Run, *rates: float) -> list[Run]:
    """Return final runs at rates that are not tuned for the arm."""
    grid = itertools.product(rates, FINAL_SEEDS)
    return [replace(arm, stage="given", rate=rate, seed=seed) for rate, seed in grid]


_CAUSES = [list(causes(network(name)).values()) for name in ("8 layers", "16 layers")]
# The arms of each part, as runs without a rate and a seed; what has the stage "given" is a run
PARTS = [
    _both("2 layers", "4 layers", "8 layers"),
    _both("8 layers, BatchNorm", "8 layers, Adam"),
    _both("16 layers"),
    # The default with Kaiming's variance alone, and Kaiming's init with the default's alone
    [_CAUSES[0][4], _CAUSES[0][3]],
    # The others, but for the default itself and Kaiming's init, the eighth
    [_CAUSES[0][k] for k in (1, 2, 5, 6, 8, 9)],
    _both("8 layers, Linear", "8 layers, Linear, Adam"),
    _both("2 layers, Adam", "4 layers, Adam"),
    _both("2 layers, BatchNorm", "4 layers, BatchNorm"),
    _both("16 layers, Adam"),
    _both("16 layers, BatchNorm"),
    _both("8 layers, residual", "8 layers, residual, Adam"),
    _both("8 layers, GroupNorm", "8 layers, GroupNorm, Adam"),
    _both("8 layers, residual, zeroed", "8 layers, residual, zeroed, Adam"),
    _both("8 layers, slope 0.3"),
    _both("8 layers, 32 channels"),
    _both(*(f"{depth} layers, BatchNorm, Adam" for depth in (2, 4, 8, 16))),
    [_CAUSES[1][k] for k in (1, 2, 3, 4, 5, 6, 8, 9)],
    # The second record: holes of the first
    [
        *(run for arm in _CAUSES[1][8:] for run in _given(arm, 1e-2)),
        *(run for d in (8, 16) for run in _given(network(f"{d} layers, Kaiming"), 3.16e-2)),
    ],
    [arms_of(chain)[-1] for chain in CHAINS[:3]],
    [
        *_given(network("8 layers, residual"), 1e-2, 1.78e-2),
        *_given(network("8 layers, residual, Kaiming"), 1.78e-2, 3.16e-2),
    ],
    _given(network("8 layers, 20 epochs"), 1e-2, 1.78e-2),
    [network("16 layers, Adam, eps 1e-12")],
    _given(network("16 layers, Adam, 20 epochs"), 1e-3),
    # What people do today
    _both("4 layers, AdamW", "8 layers, AdamW"),
    _both("16 layers, AdamW"),
    _both("8 layers, warm-up", "8 layers, clipped"),
    _both("30 layers, AdamW"),
    # Other data
    _both(*(f"Fashion, {depth} layers" for depth in (4, 8, 16))),
    # Remedies
    [network(f"{depth} layers, LSUV") for depth in (8, 16)],
    *map(arms_of, CHAINS[8:]),
]


def plan(
    record: pd.DataFrame | None = None,
    slope: float = 0.0,
    only: Mapping[str, Any] | None = None,
) -> list[Run]:
    """Return all runs that are known to belong to the experiment, given the record so far.

    Part by part, first every arm at its grid of rates with `TUNE_SEEDS`. An arm that is best at
    an end of its grid gets one rate more there, until it is not; an arm that is at chance
    everywhere gets one more at either end. Then every arm at its best rate, by the mean validation
    accuracy, with `FINAL_SEEDS`. At the end of the first record, what was at chance in half of its
    final runs or more goes on to 20 epochs at its two most promising rates, with `LATE_SEEDS`. In
    the second record there are no such runs, and a third seed decides between two best rates whose
    means are within `CLOSE`. The experiment is complete when the record holds all runs of its plan.

    Args:
        record: What `sweep` returned, or None at the very start.
        slope: Negative slope of the activations, and what Kaiming's init assumes.
        only: Fields of `Run` and their values: the plan of the arms that have these.

    Example:
        >>> runs = plan()
        >>> len(runs), runs[0].stage, runs[0].rate
        (36, 'tune', 0.01)
    """
    done: dict[Run, float] = {}
    if record is not None:
        done = dict(zip(runs_of(record), record["valid_accuracy"], strict=True))

    def sloped(arm: Run) -> Run:
        return arm if arm.slope else replace(arm, slope=slope, a=arm.a or slope)

    parts = [
        [
            run
            for arm in map(sloped, part)
            if all(getattr(arm, field) == value for field, value in (only or {}).items())
            for run in _known(arm, done, second=number >= FIRST)
        ]
        for number, part in enumerate(PARTS)
    ]
    stages = [[run for run in part if run.stage != "late"] for part in parts]
    stages.insert(FIRST, [run for part in parts for run in part if run.stage == "late"])
    runs: list[Run] = []
    turn = True
    for known in stages:
        # What is in the record belongs to the plan, also when its turn would not have come yet
        runs += [run for run in known if turn or run in done]
        turn = turn and all(run in done for run in known)
    return list(dict.fromkeys(runs))  # with a slope of its own a part may repeat another


def _known(arm: Run, done: Mapping[Run, float], second: bool) -> list[Run]:
    """Return the runs of one arm that are known: of three epochs, and then late ones."""
    if arm.stage == "given":
        return [arm]

    def runs(stage: str, rates: Iterable[float], seeds: Iterable[int], **more: int) -> list[Run]:
        grid = itertools.product(rates, seeds)
        return [replace(arm, stage=stage, rate=rate, seed=seed, **more) for rate, seed in grid]

    def mean(rate: float, seeds: Sequence[int] = TUNE_SEEDS) -> float:
        return sum(done[run] for run in runs("tune", [rate], seeds)) / len(seeds)

    def order(rate: float) -> tuple[float, int]:
        """By the accuracy; the rates at chance by their place in the grid."""
        return -max(mean(rate), CHANCE), abs(RATES.index(rate) - middle)

    low, middle, high = (RATES.index(rate) for rate in GRIDS[arm.optimizer])
    while True:
        tune = runs("tune", RATES[low : high + 1], TUNE_SEEDS)
        if not all(run in done for run in tune):
            return tune
        best, second_best, *_ = sorted(RATES[low : high + 1], key=order)
        lost = mean(best) < CHANCE and high - low == 2
        wider = low - (lost or best == RATES[low]), high + (lost or best == RATES[high])
        wider = max(wider[0], 0), min(wider[1], len(RATES) - 1)
        if wider == (low, high):
            break
        low, high = wider
    if second and mean(second_best) >= CHANCE and mean(best) - mean(second_best) <= CLOSE:
        pair = sorted([best, second_best])
        tune += runs("tune", pair, [THIRD_SEED])
        if not all(run in done for run in tune):
            return tune
        best = max(pair, key=lambda rate: mean(rate, (*TUNE_SEEDS, THIRD_SEED)))
    final = runs("final", [best], FINAL_SEEDS)
    failed = [run for run in final if run in done and done[run] < CHANCE]
    if second or 2 * len(failed) < len(final):
        return tune + final
    return tune + final + runs("late", [best, second_best], LATE_SEEDS, steps=20 * EPOCH)
