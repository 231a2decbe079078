"""Which runs the experiment consists of, given what its record holds so far."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
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
FASHION = {"data": "fashion", "goal": 0.8}


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


def parts(slope: float = 0.0) -> list[list[Run]]:
    """Return the arms of each part of the experiment, as runs without a rate and a seed.

    What has the stage "given" is no arm but a run.
    """
    default = Run(slope=slope)
    kaimings = kaiming(default)

    def arms(*depths: int, **settings: Any) -> list[Run]:
        both = (default, kaimings)
        return [replace(init, depth=d, **settings) for d in depths for init in both]

    def optimized(**settings: Any) -> list[Run]:
        return [
            arm for optimizer in ("sgd", "adam") for arm in arms(8, optimizer=optimizer, **settings)
        ]

    inits = [*causes(default).values()]
    others = inits[1:7] + inits[8:]  # the first is the default, the eighth Kaiming's: arms already
    leaky = [replace(default, slope=0.3), kaiming(replace(default, slope=0.3))]
    adam, batch = {"optimizer": "adam"}, {"norm": "batch"}

    def given(init: Run, *rates: float, **settings: Any) -> list[Run]:
        grid = itertools.product(rates, FINAL_SEEDS)
        return [replace(init, stage="given", rate=r, seed=s, **settings) for r, s in grid]

    late, blocks = {"steps": 20 * EPOCH}, {"net": "residual"}
    holes = [
        *(run for init in others[-2:] for run in given(init, 1e-2, depth=16)),
        *(run for depth in (8, 16) for run in given(kaimings, 3.16e-2, depth=depth)),
    ]
    common = given(default, 1e-2, 1.78e-2, **blocks) + given(kaimings, 1.78e-2, 3.16e-2, **blocks)
    # The default, the gain that torch has for it (or for a ReLU), and its own
    gains = {
        act: [
            replace(default, act=act),
            *(replace(kaimings, act=act, a=1.0, gain=round(g, 4)) for g in (near, gain(own))),
        ]
        for act, near, own in (("gelu", gain(0.0), nn.GELU()), ("tanh", 5 / 3, nn.Tanh()))
    }
    separable = [
        replace(init, net="separable", mode=mode)
        for init, mode in ((default, "fan_in"), (kaimings, "fan_in"), (kaimings, "fan_out"))
    ]
    reader = replace(default, net="lstm", depth=28, width=64, **adam)
    gpt = Run(net="gpt", depth=4, width=64, data="sort", goal=0.99, steps=EPOCH, **MODERN)
    first = [
        arms(2, 4, 8),
        arms(8, **batch) + arms(8, **adam),
        arms(16),
        # The default with Kaiming's variance alone, and Kaiming's init with the default's alone
        [others[3], others[2]],
        others[:2] + others[4:],
        optimized(net="linear", width=256),
        arms(2, 4, **adam),
        arms(2, 4, **batch),
        arms(16, **adam),
        arms(16, **batch),
        optimized(net="residual"),
        optimized(norm="group"),
        optimized(net="residual", zeroed=True),
        leaky if slope != 0.3 else [],
        arms(8, width=32),
        arms(2, 4, 8, 16, **adam, **batch),
        [replace(arm, depth=16) for arm in others],
    ]
    second = [
        holes,
        [
            *(replace(kaimings, drawn=layers) for layers in ("convolutions", "last")),
            replace(kaimings, last=0.1),
        ],
        common,
        given(default, 1e-2, 1.78e-2, **late),
        [replace(default, depth=16, eps=1e-12, **adam)],
        given(default, 1e-3, depth=16, **adam, **late),
        # What people do today
        arms(4, 8, **MODERN),
        arms(16, **MODERN),
        arms(8, warmup=300) + arms(8, clip=1.0),
        arms(4, 8, 16, **MODERN, **batch),
        arms(30, **MODERN),
        arms(30, **MODERN, **batch),
        # Other data, more channels
        arms(4, 8, 16, **FASHION),
        arms(4, 8, 16, **FASHION, **adam),
        arms(4, 8, 16, **FASHION, **batch),
        arms(20, **FASHION, **batch, **blocks),
        arms(8, width=64),
        # Remedies
        [replace(default, scheme="lsuv", a=0.0, bias="zeros", depth=depth) for depth in (8, 16)],
        *([replace(arm, norm=norm) for arm in gains["gelu"]] for norm in ("none", "batch")),
        *([replace(arm, norm=norm) for arm in gains["tanh"]] for norm in ("none", "batch")),
        *([replace(arm, norm=norm) for arm in separable] for norm in ("batch", "frozen", "none")),
        [reader, replace(reader, forget=1.0)],
        [replace(reader, depth=98), replace(reader, depth=98, forget=1.0)],
        [replace(gpt, scheme=scheme) for scheme in ("default", "gpt2", "gpt2_scaled")],
    ]
    return first + second


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
    arms = [
        [
            _arm(arm, done, second=number >= FIRST)
            for arm in part
            if all(getattr(arm, field) == value for field, value in (only or {}).items())
        ]
        for number, part in enumerate(parts(slope))
    ]
    stages = [[run for known, _ in part for run in known] for part in arms]
    stages.insert(FIRST, [run for part in arms for _, late in part for run in late])
    runs: list[Run] = []
    turn = True
    for known in stages:
        # What is in the record belongs to the plan, also when its turn would not have come yet
        runs += [run for run in known if turn or run in done]
        turn = turn and all(run in done for run in known)
    return runs


def _arm(arm: Run, done: Mapping[Run, float], second: bool) -> tuple[list[Run], list[Run]]:
    """Return the runs of one arm that are known: those of three epochs, and the late ones."""
    if arm.stage == "given":
        return [arm], []

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
            return tune, []
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
            return tune, []
        best = max(pair, key=lambda rate: mean(rate, (*TUNE_SEEDS, THIRD_SEED)))
    final = runs("final", [best], FINAL_SEEDS)
    failed = [run for run in final if run in done and done[run] < CHANCE]
    late = runs("late", [best, second_best], LATE_SEEDS, steps=20 * EPOCH)
    return tune + final, late if 2 * len(failed) >= len(final) and not second else []
