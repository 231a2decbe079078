"""The record of the training experiment: complete, sane, and met by what runs here."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from initlab import load_fashion
from initlab.training import run as running
from initlab.training.plan import FINAL_SEEDS, plan
from initlab.training.record import read, runs_of
from initlab.training.run import train

PATH = Path(__file__).resolve().parents[1] / "data" / "training" / "runs.csv"
RECORD = read(PATH)  # which refuses a row that is damaged, out of range, or there twice
RUNS = runs_of(RECORD)


def test_complete():
    assert len(RUNS) == len(set(RUNS))
    assert set(RUNS) == set(plan(RECORD))


def test_small_and_in_range():
    assert PATH.stat().st_size < 2_000_000
    assert (RECORD["signal"] > 0).all()
    assert RECORD["grad_rms"].between(0, 100).all()
    assert RECORD.loc[~RECORD["diverged"], "loss_1"].between(1, 100).all()
    # 90 % of 2,000 pictures and some of the others: only a run that fell back ends far below
    ends = RECORD.loc[(RECORD["stage"] == "late") & RECORD["step_90"].notna(), "valid_accuracy"]
    assert (ends > 0.85).all()


# Relative, ten times the largest difference found between vector instructions of three ages
# (AVX2, AVX, SSE4.1) in six networks; a file holds six digits. After 8 steps it was 6e-4 already.
TOLERANCE = {"signal": 1e-5, "grad_rms": 3e-3, "loss_1": 5e-6, "loss_2": 1e-4, "loss_4": 1e-3}


def fashion_or_skip():
    try:
        load_fashion()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("part", range(6))
def test_rows_are_met_by_their_first_steps(part, monkeypatch):
    monkeypatch.setattr(running, "accuracy", lambda *args: math.nan)  # for time
    number = (2 * part + 1) * len(RUNS) // 12
    if RUNS[number].data == "fashion":
        fashion_or_skip()
    found, row = train(replace(RUNS[number], stage="tune", steps=4)), RECORD.iloc[number]
    for column, tolerance in TOLERANCE.items():
        # Logits of 0.1 are rounded by 2^-25 of their size, 3e-9: so much is in a signal, squared
        rounding = 3e-9**2 / (2 * row["signal"]) if column == "signal" else 0.0
        near = pytest.approx(row[column], rel=tolerance, abs=rounding, nan_ok=True)
        assert found[column] == near, column


def test_a_run_falls_among_its_seeds(monkeypatch):
    monkeypatch.setattr(running, "LOOKS", [256])  # for time
    monkeypatch.setattr(running, "LOOK_EVERY", math.inf)
    run = next(run for run in RUNS if run.stage == "final" and run.depth == 2)
    seeds = RECORD[[replace(other, seed=run.seed) == run for other in RUNS]]["valid_256"]
    assert len(seeds) == len(FINAL_SEEDS)
    found = train(replace(run, steps=256))["valid_256"]
    # A rounding makes it another run after some hundred steps: then it is one seed more
    reach = stats.t.ppf(1 - 1e-4, len(seeds) - 1) * seeds.std() * math.sqrt(1 + 1 / len(seeds))
    assert abs(found - seeds.mean()) < reach
