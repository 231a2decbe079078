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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
import torch
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from initlab import mnist
from initlab.init import gain, initialize_
from initlab.net import Residual, accuracy, conv_stack, fit

BATCH = 128
EPOCH = 50_000 // BATCH
LOOKS = [2**k for k in range(13)]  # steps whose loss and validation accuracy are recorded
LOOK_PICTURES, LOOK_EVERY = 2000, 25  # to find the first step with 90 % validation accuracy
CHANCE = 0.2  # ten digits, the most common one 10.6 % of the validation pictures

RATES = (3.16e-5, 1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1, 3.16e-1, 1.0, 3.16)
ADAM = (1e-3, 3.16e-3, 1e-2)
GRIDS = {"sgd": (1e-2, 3.16e-2, 1e-1), "adam": ADAM, "adamw": ADAM}
TUNE_SEEDS, FINAL_SEEDS, LATE_SEEDS = (0, 1), range(10, 18), (20, 21)
FIRST = 17  # parts of the first record
THIRD_SEED, CLOSE = 2, 0.005  # in the second record, for two best rates as close as that


@dataclass(frozen=True)
class Run:
    """All settings of one training run.

    Attributes:
        stage: "tune" chooses the rate, "final" is reported, "late" goes on to 20 epochs, "given"
            has a rate that was not tuned for it, and is reported, too.
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
        steps: Steps of 128 pictures. A run of more than three epochs ends at its goal.
        data: "mnist" or "fashion" (Fashion-MNIST).
        goal: Share of the 2,000 validation pictures that `step_90` waits for.
        eps: Of Adam and AdamW.
        weight_decay: Of AdamW, for all parameters.
        warmup: Steps in which the rate grows in a line from 0 to `rate`.
        cosine: Whether the rate then falls to 0 as half a cosine, else it stays.
        clip: Largest norm of the gradient of all parameters; a larger one is scaled down to it.
        drawn: Layers that the scheme draws: "all", or "convolutions" or "last", the linear layer;
            the others are those of the default with the same seed.
        last: Factor on the weight and bias of the last layer.
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
    data: str = "mnist"
    goal: float = 0.9
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: int = 0
    cosine: bool = False
    clip: float = math.inf
    drawn: str = "all"
    last: float = 1.0


RUN = [field.name for field in fields(Run)]
RESULT = ["diverged", "signal", "grad_rms", "step_90", "valid_accuracy", "test_accuracy"]
COLUMNS = [*RUN, *RESULT, *(f"loss_{k}" for k in LOOKS), *(f"valid_{k}" for k in LOOKS)]
HEADER = ",".join(COLUMNS)


# ---- The plan


def parts(slope: float = 0.0) -> list[list[Run]]:
    """Return the arms of each part of the experiment, as runs without a rate and a seed.

    What has the stage "given" is no arm but a run.
    """
    default = Run(slope=slope)
    kaiming = replace(default, scheme="kaiming_normal", a=slope, bias="zeros")

    def arms(*depths: int, **settings: Any) -> list[Run]:
        inits = (default, kaiming)
        return [replace(init, depth=d, **settings) for d in depths for init in inits]

    def optimized(**settings: Any) -> list[Run]:
        return [
            arm for optimizer in ("sgd", "adam") for arm in arms(8, optimizer=optimizer, **settings)
        ]

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

    def given(init: Run, *rates: float, **settings: Any) -> list[Run]:
        grid = itertools.product(rates, FINAL_SEEDS)
        return [replace(init, stage="given", rate=r, seed=s, **settings) for r, s in grid]

    late, blocks = {"steps": 20 * EPOCH}, {"net": "residual"}
    modern = {"optimizer": "adamw", "weight_decay": 0.05, "warmup": 100, "cosine": True}
    fashion = {"data": "fashion", "goal": 0.8}
    holes = [
        *(run for init in causes[-2:] for run in given(init, 1e-2, depth=16)),
        *(run for depth in (8, 16) for run in given(kaiming, 3.16e-2, depth=depth)),
    ]
    common = given(default, 1e-2, 1.78e-2, **blocks) + given(kaiming, 1.78e-2, 3.16e-2, **blocks)
    first = [
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
    second = [
        holes,
        [
            *(replace(kaiming, drawn=layers) for layers in ("convolutions", "last")),
            replace(kaiming, last=0.1),
        ],
        common,
        given(default, 1e-2, 1.78e-2, **late),
        [replace(default, depth=16, eps=1e-12, **adam)],
        given(default, 1e-3, depth=16, **adam, **late),
        # What people do today
        arms(4, 8, **modern),
        arms(16, **modern),
        arms(8, warmup=300) + arms(8, clip=1.0),
        arms(4, 8, 16, **modern, **batch),
        arms(30, **modern),
        arms(30, **modern, **batch),
        # Other data, more channels
        arms(4, 8, 16, **fashion),
        arms(4, 8, 16, **fashion, **adam),
        arms(4, 8, 16, **fashion, **batch),
        arms(20, **fashion, **batch, **blocks),
        arms(8, width=64),
    ]
    return first + second


def plan(record: pd.DataFrame | None = None, slope: float = 0.0) -> list[Run]:
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

    Example:
        >>> runs = plan()
        >>> len(runs), runs[0].stage, runs[0].rate
        (36, 'tune', 0.01)
    """
    done = {} if record is None else _accuracies(record)
    arms = [
        [_arm(arm, done, second=number >= FIRST) for arm in part]
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


def _accuracies(record: pd.DataFrame) -> dict[Run, float]:
    rows = record[RUN].to_dict("records")
    return dict(zip((Run(**row) for row in rows), record["valid_accuracy"], strict=True))


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
    initialize_(model, run.scheme, run.a, bias=run.bias, generator=generator)
    with torch.no_grad():
        if run.scheme.startswith(("xavier", "orthogonal")):  # which take no slope
            for layer in model.modules():
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    layer.weight *= gain(run.a)
        for block in model.modules():
            if run.zeroed and isinstance(block, Residual):
                nn.init.zeros_(block[-1].weight)
                nn.init.zeros_(block[-1].bias)
        if run.drawn != "all":
            other = build(replace(run, scheme="default", bias="default", drawn="all", last=1.0))
            for layer, twin in zip(model.modules(), other.modules(), strict=True):
                if isinstance(layer, nn.Linear if run.drawn == "convolutions" else nn.Conv2d):
                    layer.load_state_dict(twin.state_dict())
        for parameter in model[-1].parameters():
            parameter *= run.last
    # The faster order of the numbers in memory, by a sixth
    return model.to(memory_format=torch.channels_last)


@cache
def _data(name: str) -> mnist.MNISTSplits:
    return getattr(mnist, f"load_{name}")()


def _optimizer(run: Run, model: nn.Module) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """Return the optimizer of a run, and the schedule that is to follow each of its steps."""
    settings: dict[str, Any] = {"lr": run.rate, "fused": True}
    if run.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, **settings)
    elif run.optimizer == "adam":
        optimizer = torch.optim.Adam(model.parameters(), eps=run.eps, **settings)
    else:
        settings |= {"eps": run.eps, "weight_decay": run.weight_decay}
        optimizer = torch.optim.AdamW(model.parameters(), **settings)
    if run.clip < math.inf:

        def clip(*_: Any) -> None:
            nn.utils.clip_grad_norm_(model.parameters(), run.clip)

        optimizer.register_step_pre_hook(clip)

    def factor(done: int) -> float:
        if done < run.warmup:
            return (done + 1) / run.warmup
        turn = (done - run.warmup) / (run.steps - run.warmup)
        return (1 + math.cos(math.pi * turn)) / 2 if run.cosine else 1.0

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train(run: Run) -> dict[str, Any]:
    """Train one network as `run` says, on one thread, and return its record.

    The record has the fields of `Run`, `diverged` (whether a loss was not finite), `signal` and
    `grad_rms` before the first step (see `look`), `step_90` (the first multiple of 25 steps after
    which the share `goal` of 2,000 validation pictures is recognised; None if never), the
    accuracies on the 10,000 validation and the 10,000 test pictures at the end, and at steps 1, 2,
    4 ... the loss of the batch before the step and the accuracy on the 2,000 pictures after it.

    Example:
        >>> record = train(Run(depth=2, steps=2))
        >>> record["diverged"], record["step_90"], round(record["loss_1"], 1)
        (False, None, 2.3)
    """
    data, threads = _data(run.data), torch.get_num_threads()
    x, y = data.x_valid[:LOOK_PICTURES], data.y_valid[:LOOK_PICTURES]
    torch.set_num_threads(1)
    try:
        model = build(run)
        record = asdict(run) | dict.fromkeys(COLUMNS[len(RUN) :])
        record["signal"], record["grad_rms"] = look(model, x[:500], y[:500])
        optimizer, schedule = _optimizer(run, model)

        def ended() -> bool:
            return run.steps > 3 * EPOCH and record["step_90"] is not None

        def after(step: int) -> bool:
            schedule.step()
            if step in LOOKS:
                record[f"valid_{step}"] = accuracy(model, x, y, 250)
            look_now = record["step_90"] is None and step % LOOK_EVERY == 0
            if look_now and _is_at(run.goal, model, x, y):
                record["step_90"] = step
            return ended()

        losses = fit(
            model,
            data.x_train,
            data.y_train,
            optimizer=optimizer,
            steps=run.steps,
            batch_size=BATCH,
            # Not the generator of the weights: all inits see the same order
            generator=Generator().manual_seed(run.seed),
            after=after,
        )
        finite = [loss for loss in losses if math.isfinite(loss)]
        record["diverged"] = len(finite) < run.steps and not ended()
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


def _is_at(goal: float, model: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Tell whether the share `goal` of all pictures is recognised."""
    # For time: with less than a fifth of so many first ones it is impossible
    first = round((1 - goal) / 0.8 * len(x))
    if accuracy(model, x[:first], y[:first], 250) < 0.2:
        return False
    return accuracy(model, x, y, 250) >= goal


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
