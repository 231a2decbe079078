"""The training experiment: what is run, how one run is measured, and the record of all runs.

`plan` says which runs there are, `train` makes one record of one run, and `sweep` trains many, in
processes or on a Dask cluster, into a CSV file that grows row by row and can be gone on with.
"""

import copy
import fcntl
import io
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from initlab.init import gain, initialize_
from initlab.mnist import load_mnist
from initlab.net import Residual, accuracy, conv_stack, fit

BATCH = 128
EPOCH = 50_000 // BATCH
LOOKS = [2**k for k in range(13)]  # steps whose loss and validation accuracy are recorded
LOOK_PICTURES, LOOK_EVERY = 2000, 25  # to find the first step with 90 % validation accuracy
CHANCE = 0.2  # ten digits, the most common one 10.6 % of the validation pictures

RATES = (3.16e-5, 1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1, 3.16e-1, 1.0, 3.16)
GRIDS = {"sgd": (1e-2, 3.16e-2, 1e-1), "adam": (1e-3, 3.16e-3, 1e-2)}
TUNE_SEEDS, FINAL_SEEDS, LATE_SEEDS = (0, 1), range(10, 18), (20, 21)


@dataclass(frozen=True)
class Run:
    """All settings of one training run.

    Attributes:
        stage: "tune" chooses the rate, "final" is reported, "late" goes on to 20 epochs.
        net: "plain" or "residual" (convolutions), or "linear" (`nn.Linear` layers).
        depth: Convolutions, or hidden linear layers.
        width: Channels, or features.
        norm: "none", "batch" or "group", after each convolution.
        slope: Negative slope of each activation; 0 is a ReLU.
        scheme: Of the weights, as in `initialize_`.
        a: Negative slope that the scheme assumes; sqrt(5) gives n Var(w) = 1/3.
        bias: "default" or "zeros".
        zeroed: Whether the last convolution of each residual branch starts at 0.
        optimizer: "sgd" (momentum 0.9) or "adam".
        rate: Learning rate, constant.
        seed: Of the weights and of the order of the pictures.
        steps: Steps of 128 pictures.
    """

    stage: str = "tune"
    net: str = "plain"
    depth: int = 8
    width: int = 16
    norm: str = "none"
    slope: float = 0.0
    scheme: str = "default"
    a: float = math.sqrt(5)
    bias: str = "default"
    zeroed: bool = False
    optimizer: str = "sgd"
    rate: float = 1e-2
    seed: int = 0
    steps: int = 3 * EPOCH


RUN = [field.name for field in fields(Run)]
RESULT = ["diverged", "signal", "grad_rms", "step_90", "valid_accuracy", "test_accuracy"]
COLUMNS = [*RUN, *RESULT, *(f"loss_{k}" for k in LOOKS), *(f"valid_{k}" for k in LOOKS)]
HEADER = ",".join(COLUMNS)


# ---- The plan


def parts(slope: float = 0.0) -> list[list[Run]]:
    """Return the arms of each part of the experiment, as runs without a rate and a seed."""
    default = Run(slope=slope)
    kaiming = replace(default, scheme="kaiming_normal", a=slope, bias="zeros")

    def arms(*depths: int, **settings: Any) -> list[Run]:
        inits = (default, kaiming)
        return [replace(init, depth=d, **settings) for d in depths for init in inits]

    def optimized(**settings: Any) -> list[Run]:
        return [arm for optimizer in GRIDS for arm in arms(8, optimizer=optimizer, **settings)]

    causes = [
        replace(default, scheme=f"kaiming_{shape}", a=a, bias=bias)
        for a in (math.sqrt(5), slope)
        for shape in ("uniform", "normal")
        for bias in ("default", "zeros")
    ][1:-1]  # of the eight the first is the default, the last Kaiming's: both are arms already
    causes += [
        replace(kaiming, scheme="xavier_normal", a=1.0),  # gain 1: torch's own default
        replace(kaiming, scheme="orthogonal"),
    ]
    leaky = [replace(default, slope=0.3), replace(kaiming, slope=0.3, a=0.3)]
    adam, batch = {"optimizer": "adam"}, {"norm": "batch"}
    return [
        arms(2, 4, 8),
        arms(8, **batch) + arms(8, **adam),
        arms(16),
        # The default with Kaiming's variance alone, and Kaiming's init with the default's alone
        [causes[3], causes[2]],
        causes[:2] + causes[4:],
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
        [replace(arm, depth=16) for arm in causes],
    ]


def plan(record: pd.DataFrame | None = None, slope: float = 0.0) -> list[Run]:
    """Return all runs that are known to belong to the experiment, given the record so far.

    Part by part, first every arm at its grid of rates with `TUNE_SEEDS`. An arm that is best at
    an end of its grid gets one rate more there, until it is not; an arm that is at chance
    everywhere gets one more at either end. Then every arm at its best rate, by the mean validation
    accuracy, with `FINAL_SEEDS`. At the very end, what was at chance in half of its final runs or
    more goes on to 20 epochs at its two most promising rates, with `LATE_SEEDS`. The experiment is
    complete when the record holds all runs of its own plan.

    Args:
        record: What `sweep` returned, or None at the very start.
        slope: Negative slope of the activations, and what Kaiming's init assumes.

    Example:
        >>> runs = plan()
        >>> len(runs), runs[0].stage, runs[0].rate
        (36, 'tune', 0.01)
    """
    done = {} if record is None else _accuracies(record)
    arms = [[_arm(arm, done) for arm in part] for part in parts(slope)]
    stages = [[run for known, _ in part for run in known] for part in arms]
    stages.append([run for part in arms for _, late in part for run in late])
    runs: list[Run] = []
    turn = True
    for known in stages:
        # What is in the record belongs to the plan, also when its turn would not have come yet
        runs += [run for run in known if turn or run in done]
        turn = turn and all(run in done for run in known)
    return runs


def _accuracies(record: pd.DataFrame) -> dict[Run, float]:
    rows = record[RUN].to_dict("records")
    return dict(zip((Run(**row) for row in rows), record["valid_accuracy"], strict=True))


def _arm(arm: Run, done: Mapping[Run, float]) -> tuple[list[Run], list[Run]]:
    """Return the runs of one arm that are known: those of three epochs, and the late ones."""

    def runs(stage: str, rates: Iterable[float], seeds: Iterable[int], **more: int) -> list[Run]:
        grid = itertools.product(rates, seeds)
        return [replace(arm, stage=stage, rate=rate, seed=seed, **more) for rate, seed in grid]

    def mean(rate: float) -> float:
        return sum(done[run] for run in runs("tune", [rate], TUNE_SEEDS)) / len(TUNE_SEEDS)

    def order(rate: float) -> tuple[float, int]:
        """By the accuracy; the rates at chance by their place in the grid."""
        return -max(mean(rate), CHANCE), abs(RATES.index(rate) - middle)

    low, middle, high = (RATES.index(rate) for rate in GRIDS[arm.optimizer])
    while True:
        tune = runs("tune", RATES[low : high + 1], TUNE_SEEDS)
        if not all(run in done for run in tune):
            return tune, []
        best, second, *_ = sorted(RATES[low : high + 1], key=order)
        lost = mean(best) < CHANCE and high - low == 2
        wider = low - (lost or best == RATES[low]), high + (lost or best == RATES[high])
        wider = max(wider[0], 0), min(wider[1], len(RATES) - 1)
        if wider == (low, high):
            break
        low, high = wider
    final = runs("final", [best], FINAL_SEEDS)
    failed = [run for run in final if run in done and done[run] < CHANCE]
    late = runs("late", [best, second], LATE_SEEDS, steps=20 * EPOCH)
    return tune + final, late if 2 * len(failed) >= len(final) else []


# ---- One run


def build(run: Run) -> nn.Module:
    """Return the network of a run, initialised, in training mode."""
    if run.net == "linear":
        act = nn.LeakyReLU(run.slope) if run.slope else nn.ReLU()
        sizes = [28 * 28, *[run.width] * run.depth]
        hidden = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), act)]
        model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(run.width, 10))
    else:
        model = conv_stack(
            run.depth,
            run.width,
            slope=run.slope,
            norm=run.norm,
            residual=run.net == "residual",
            downsample=2,
            classes=10,
            pooled=2,
        )
    generator = Generator().manual_seed(run.seed)
    slope = {"a": run.a} if run.scheme.startswith("kaiming") else {}
    if run.scheme.startswith(("xavier", "orthogonal")):  # which take no slope
        slope = {"gain": gain(run.a)}
    initialize_(model, run.scheme, bias=run.bias, generator=generator, **slope)
    with torch.no_grad():
        for block in model.modules():
            if run.zeroed and isinstance(block, Residual):
                nn.init.zeros_(block[-1].weight)
                nn.init.zeros_(block[-1].bias)
    # The faster order of the numbers in memory, by a sixth
    return model.to(memory_format=torch.channels_last)


_data = cache(load_mnist)


def train(run: Run) -> dict[str, Any]:
    """Train one network as `run` says, on one thread, and return its record.

    The record has the fields of `Run`, `diverged` (whether a loss was not finite), `signal` and
    `grad_rms` before the first step (see `look`), `step_90` (the first multiple of 25 steps after
    which 2,000 validation pictures are recognised to 90 %; None if never), the accuracies on the
    10,000 validation and the 10,000 test pictures at the end, and at steps 1, 2, 4 ... the loss of
    the batch before the step and the accuracy on the 2,000 pictures after it. A "late" run ends
    where it comes to 90 %.

    Example:
        >>> record = train(Run(depth=2, steps=2))
        >>> record["diverged"], record["step_90"], round(record["loss_1"], 1)
        (False, None, 2.3)
    """
    data, threads = _data(), torch.get_num_threads()
    x, y = data.x_valid[:LOOK_PICTURES], data.y_valid[:LOOK_PICTURES]
    torch.set_num_threads(1)
    try:
        model = build(run)
        record = asdict(run) | dict.fromkeys(COLUMNS[len(RUN) :])
        record["signal"], record["grad_rms"] = look(model, x[:500], y[:500])
        sgd = partial(torch.optim.SGD, momentum=0.9)
        kind = {"sgd": sgd, "adam": torch.optim.Adam}[run.optimizer]

        def after(step: int) -> bool:
            if step in LOOKS:
                record[f"valid_{step}"] = accuracy(model, x, y, 250)
            if record["step_90"] is None and step % LOOK_EVERY == 0 and _is_90(model, x, y):
                record["step_90"] = step
            return run.stage == "late" and record["step_90"] is not None

        losses = fit(
            model,
            data.x_train,
            data.y_train,
            optimizer=kind(model.parameters(), lr=run.rate, fused=True),
            steps=run.steps,
            batch_size=BATCH,
            # Not the generator of the weights: all inits see the same order
            generator=Generator().manual_seed(run.seed),
            after=after,
        )
        finite = [loss for loss in losses if math.isfinite(loss)]
        ended = run.stage == "late" and record["step_90"] is not None
        record["diverged"] = len(finite) < run.steps and not ended
        record |= {f"loss_{k}": losses[k - 1] for k in LOOKS if k <= len(finite)}
        record["valid_accuracy"] = accuracy(model, data.x_valid, data.y_valid, 250)
        record["test_accuracy"] = accuracy(model, data.x_test, data.y_test, 250)
    finally:
        torch.set_num_threads(threads)
    return record


def look(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return what a look at the start shows, in training mode; `model` is left as it is.

    The signal of the logits: their standard deviation across inputs, as in `trace`. And the rms of
    the gradient of the cross-entropy with respect to the first layer's weight.
    """
    probe = copy.deepcopy(model)
    logits = probe(x)
    nn.functional.cross_entropy(logits, y).backward()
    gradient = next(probe.parameters()).grad
    signal = logits.detach().double().var(0).mean().sqrt()
    return signal.item(), gradient.double().square().mean().sqrt().item()


def _is_90(model: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Tell whether 90 % of 2,000 pictures are recognised."""
    # For time: with fewer than 50 of the first 250 it is impossible
    return accuracy(model, x[:250], y[:250]) >= 0.2 and accuracy(model, x, y, 250) >= 0.9


# ---- The record


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
        except (ValueError, KeyError) as error:
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
    kinds = {field.name: field.type for field in fields(Run)} | {"diverged": bool, "step_90": int}
    row: dict[str, Any] = {}
    for column, cell in zip(COLUMNS, cells, strict=True):
        kind = kinds.get(column, float)
        if kind is bool:
            row[column] = {"True": True, "False": False}[cell]
        else:
            row[column] = kind(cell) if cell or column in RUN else math.nan
    for column in ("valid_accuracy", "test_accuracy"):
        if not 0 <= row[column] <= 1:
            raise ValueError(f"{column} is {row[column]}")
    if row["step_90"] <= 0 or row["step_90"] > row["steps"]:
        raise ValueError(f"step_90 is {row['step_90']} of {row['steps']} steps")
    return row


def _line(record: Mapping[str, Any]) -> str:
    """Return a record as one line; results have six digits, settings all of theirs."""

    def cell(column: str) -> str:
        value = record[column]
        if value is None:
            return ""
        return f"{value:.6g}" if isinstance(value, float) and column not in RUN else str(value)

    return ",".join(map(cell, COLUMNS))


@contextmanager
def _locked(path: Path) -> Iterator[io.FileIO]:
    """Open a record to read and append, for one process alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however
        except OSError:
            raise RuntimeError(f"{path}: another sweep is writing to it") from None
        yield file


def sweep(
    runs: Iterable[Run],
    path: str | os.PathLike[str],
    jobs: int = 1,
    dask: str | None = None,
) -> pd.DataFrame:
    """Train all `runs` that the record at `path` does not hold yet, and return the record.

    Each finished run is appended as one row at once. Killed at any moment, the next call goes on:
    it loses the runs that were under way, and a row that was cut short.

    Args:
        runs: All runs of the record, those done before included.
        path: The CSV file; made if there is none.
        jobs: Local processes.
        dask: Address of a Dask scheduler whose workers train in place of local processes.

    Returns:
        One row a run, in the order of `runs`.

    Raises:
        RuntimeError: Another sweep is writing to the file.
        ValueError: The file holds a damaged row, or a run that is not among `runs`; see `read`.
    """
    runs, path = list(dict.fromkeys(runs)), Path(path)
    with _locked(path) as file, ExitStack() as stack:
        done = _accuracies(read(path, runs))
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)  # what follows is a row cut short
        if not whole:
            file.write(f"{HEADER}\n".encode())
        # The longest first, so that none is left alone at the end
        left = sorted((run for run in runs if run not in done), key=_cost, reverse=True)
        if dask is not None:
            from distributed import Client  # not needed otherwise

            stack.enter_context(Client(dask))
            stack.enter_context(joblib.parallel_config(backend="dask"))
        workers = joblib.Parallel(jobs if dask is None else None, return_as="generator_unordered")
        work = sum(map(_cost, left))
        bar = stack.enter_context(tqdm(total=work, unit_scale=True, unit="work", desc="sweep"))
        for record in workers(joblib.delayed(train)(run) for run in left):
            file.write(f"{_line(record)}\n".encode())
            os.fsync(file)
            bar.update(_cost(Run(**{field: record[field] for field in RUN})))
    record = read(path, runs)
    place = {run: number for number, run in enumerate(_accuracies(record))}
    return record.iloc[[place[run] for run in runs]]


def _cost(run: Run) -> int:
    """Return the work of a run, in steps of one convolution of 16 channels, roughly."""
    return run.steps * (run.depth + 2) * (1 if run.net == "linear" else run.width // 8)


def add_command(commands: Any) -> None:
    """Add `sweep` to the commands of `python -m initlab`."""
    command = commands.add_parser("sweep", help="run the training experiment, or go on with it")
    command.add_argument("--jobs", type=int, default=os.cpu_count(), help="local processes")
    command.add_argument("--dask", metavar="ADDRESS", help="scheduler of a Dask cluster")
    command.add_argument("--out", type=Path, default=Path("runs.csv"), metavar="FILE")
    command.add_argument("--slope", type=float, default=0.0, help="of every activation below 0")
    command.set_defaults(func=main)


def main(args: Any) -> int:
    """Sweep stage after stage, until the record is complete."""
    record = read(args.out) if args.out.exists() else None
    while True:
        runs = plan(record, args.slope)
        if record is not None and set(runs) == set(_accuracies(record)):
            print(f"{args.out}: complete, {len(record)} runs")
            return 0
        record = sweep(runs, args.out, args.jobs, args.dask)
