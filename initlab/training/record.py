"""The record of the experiment: what a row means, and how it is read and written."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

BATCH = 128
EPOCH = 50_000 // BATCH
CHANCE = 0.2  # ten digits, the most common one 10.6 % of the validation pictures
LOOKS = [2**k for k in range(13)]  # steps whose loss and validation accuracy are recorded


@dataclass(frozen=True)
class Run:
    """All settings of one training run: the first columns of a record."""

    # "tune" chooses the rate, "final" is reported, "late" goes on to 20 epochs, "given" has a rate
    # that was not tuned for it, and is reported, too
    stage: str = "tune"
    net: str = "plain"  # or "residual", "separable", "linear", "lstm", "gpt": see `build`
    depth: int = 8  # convolutions, hidden linear layers, steps that an LSTM reads, or blocks
    width: int = 16  # channels, or features
    norm: str = "none"  # or "batch", "frozen", "group", after each convolution
    slope: float = 0.0  # of each activation below 0; 0 is a ReLU
    # Of the weights, as in `initialize_`, or "lsuv". "default" leaves an LSTM and a GPT as PyTorch
    # draws them; for the latter there are "gpt2", all matrices N(0, 0.02^2), and "gpt2_scaled",
    # those that end a branch by another 1 / sqrt(2 blocks)
    scheme: str = "default"
    a: float = math.sqrt(5)  # negative slope that the scheme assumes; this gives n Var(w) = 1/3
    bias: str = "default"  # or "zeros"
    zeroed: bool = False  # whether the last convolution of each residual branch starts at 0
    optimizer: str = "sgd"  # with momentum 0.9, or "adam", "adamw"
    rate: float = 1e-2  # of learning, where `warmup` and `cosine` do not change it
    seed: int = 0  # of the weights and of the order of the pictures
    steps: int = 3 * EPOCH  # of 128 pictures; a run of more than three epochs ends at its goal
    data: str = "mnist"  # or "fashion", "sort": see `sequences`
    goal: float = 0.9  # share of right answers to 2,000 validation inputs that `step_90` waits for
    eps: float = 1e-8  # of Adam and AdamW
    weight_decay: float = 0.0  # of AdamW, for all parameters
    warmup: int = 0  # steps in which the rate grows in a line from 0 to `rate`
    cosine: bool = False  # whether the rate then falls to 0 as half a cosine, else it stays
    clip: float = math.inf  # largest norm of the gradient of all parameters, which is scaled to it
    # Layers that the scheme draws: or "convolutions", or "last", the linear layer; the others are
    # those of the default with the same seed
    drawn: str = "all"
    last: float = 1.0  # factor on the weight and bias of the last layer
    act: str = "relu"  # of slope `slope`, or "gelu"
    gain: float = 0.0  # of Kaiming's rule, in place of that of the slope `a`, if it is not 0
    mode: str = "fan_in"  # or "fan_out", in Kaiming's rule
    forget: float = 0.0  # bias of an LSTM's forget gate; 0 leaves it as it is drawn


RUN = [field.name for field in fields(Run)]
KINDS = {field.name: field.type for field in fields(Run)} | {"diverged": bool, "step_90": int}
RESULT = ["diverged", "signal", "grad_rms", "step_90", "valid_accuracy", "test_accuracy"]
COLUMNS = [*RUN, *RESULT, *(f"loss_{k}" for k in LOOKS), *(f"valid_{k}" for k in LOOKS)]
HEADER = ",".join(COLUMNS)


def read(path: str | os.PathLike[str], runs: Iterable[Run] | None = None) -> pd.DataFrame:
    """Read and check a record, but for a row at its end that was cut short.

    Raises:
        ValueError: Naming the line: a header of other columns, a damaged row, a row that stands
            twice, or one that is not of `runs`, if these are given.

    Example:
        >>> read("/nowhere/runs.csv")
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/runs.csv'
    """
    known = None if runs is None else set(runs)
    text = Path(path).read_text(encoding="utf8")
    whole = text[: text.rfind("\n") + 1]
    header, *lines = whole.splitlines() or [HEADER if HEADER.startswith(text) else text]
    if header != HEADER:
        raise ValueError(f"{path}, line 1: not the header of a record of this version")
    rows: dict[Run, dict[str, Any]] = {}
    for number, line in enumerate(lines, 2):
        try:
            row = _row(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: damaged ({error})") from None
        run = Run(**{field: row[field] for field in RUN})
        if run in rows:
            raise ValueError(f"{path}, line {number}: {run} stands there twice")
        if known is not None and run not in known:
            raise ValueError(f"{path}, line {number}: of another plan: {run}")
        rows[run] = row
    return pd.DataFrame(rows.values(), columns=COLUMNS).astype({"step_90": "Int64"})


def _row(line: str) -> dict[str, Any]:
    """Return one row of a record with the types of its columns."""
    cells = line.split(",")
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{len(cells)} cells, not {len(COLUMNS)}")
    row: dict[str, Any] = {}
    for column, cell in zip(COLUMNS, cells, strict=True):
        row[column] = parse(column, cell) if cell or column in RUN else math.nan
    for column in ("valid_accuracy", "test_accuracy"):
        if not 0 <= row[column] <= 1:
            raise ValueError(f"{column} is {row[column]}")
    if row["step_90"] <= 0 or row["step_90"] > row["steps"]:
        raise ValueError(f"step_90 is {row['step_90']} of {row['steps']} steps")
    return row


def parse(column: str, cell: str) -> Any:
    """Return the value of a cell; raise a ValueError if it is none of its column's type."""
    kind = KINDS.get(column, float)
    if kind is not bool:
        return kind(cell)
    if cell not in ("True", "False"):
        raise ValueError(f"{column} is {cell}")
    return cell == "True"


def runs_of(record: pd.DataFrame) -> list[Run]:
    """Return the runs whose rows a record holds, in its order."""
    return [Run(**row) for row in record[RUN].to_dict("records")]


def to_line(record: Mapping[str, Any]) -> str:
    """Return a record as one line; results have six digits, settings all of theirs."""

    def cell(column: str) -> str:
        value = record[column]
        if value is None:
            return ""
        return f"{value:.6g}" if isinstance(value, float) and column not in RUN else str(value)

    return ",".join(map(cell, COLUMNS))
