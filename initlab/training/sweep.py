"""Many runs, in processes or on a Dask cluster, into a record that grows row by row."""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
from filelock import FileLock, Timeout
from tqdm import tqdm

from initlab.training.plan import plan
from initlab.training.record import HEADER, RUN, Run, parse, read, runs_of, to_line
from initlab.training.run import train


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
        One row a run, in the order of the file.

    Raises:
        RuntimeError: Another sweep is writing to the file.
        ValueError: The file holds a damaged row, or a run that is not among `runs`; see `read`.
    """
    runs, path = list(dict.fromkeys(runs)), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:  # not a lock of the record itself, which Windows would let nobody read
            stack.enter_context(FileLock(f"{path}.lock", timeout=0))
        except Timeout:
            raise RuntimeError(f"{path}: another sweep is writing to it") from None
        file = stack.enter_context(path.open("ab+", buffering=0))
        done = set(runs_of(read(path, runs)))
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
            file.write(f"{to_line(record)}\n".encode())
            os.fsync(file)
            bar.update(_cost(Run(**{field: record[field] for field in RUN})))
    return read(path, runs)


def _cost(run: Run) -> float:
    """Return the work of a run, in steps of one convolution of 16 channels, roughly."""
    each = {"linear": 1, "lstm": 1, "gpt": 14}.get(run.net, run.width / 8)
    return run.steps * (run.depth + 2) * each


def add_command(commands: Any) -> None:
    """Add `sweep` to the commands of `initlab`."""
    command = commands.add_parser(
        "sweep",
        description="Train what the record does not hold yet, stage after stage.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command.add_argument
    only = "arms with these settings, as in: depth=8 optimizer=adamw norm=none"
    add("--only", nargs="+", metavar="FIELD=VALUE", default=[], help=only)
    add("--jobs", type=int, default=os.cpu_count(), help="local processes")
    add("--dask", metavar="ADDRESS", help="scheduler of a Dask cluster")
    add("--out", type=Path, default=Path("runs.csv"), metavar="FILE")
    add("--slope", type=float, default=0.0, help="of every activation below 0")
    command.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Sweep stage after stage, until the record is complete; return 2 for bad arguments."""
    try:
        only = dict(_setting(text) for text in args.only)
        record = read(args.out) if args.out.exists() else None
        runs = plan(record, args.slope, only)
        if not runs:
            raise ValueError("no arm of the plan has these settings")
    except ValueError as error:
        print(f"initlab sweep: {error}", file=sys.stderr)
        return 2
    while record is None or set(runs) != set(runs_of(record)):
        print(f"{len(runs)} runs known, {_minutes(runs, record, args.jobs)}", file=sys.stderr)
        record = sweep(runs, args.out, args.jobs, args.dask)
        runs = plan(record, args.slope, only)
    print(f"{args.out}: complete, {len(record)} runs")
    return 0


def _setting(text: str) -> tuple[str, Any]:
    """Return the field and the value that `field=value` names."""
    field, _, value = text.partition("=")
    if field not in RUN:
        raise ValueError(f"no setting {field!r}; known are {', '.join(RUN)}")
    return field, parse(field, value)


def _minutes(runs: Sequence[Run], record: pd.DataFrame | None, jobs: int) -> str:
    """Say how long the runs that are left will take, by the speed of a short one."""
    done = set() if record is None else set(runs_of(record))
    left = [run for run in runs if run not in done]
    if not left:  # a record of another plan, which sweep refuses
        return "none to do"
    trial = replace(left[0], steps=20)
    train(replace(trial, steps=1))  # loads the data
    start = time.perf_counter()
    train(trial)
    seconds = (time.perf_counter() - start) / _cost(trial) * sum(map(_cost, left)) / jobs
    return f"{len(left)} to do: about {seconds / 60:.0f} minutes with {jobs} processes"
