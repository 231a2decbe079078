"""`initlab trace`: the verdict on a network from a shell."""

import argparse
import ast
import json
import os
import runpy
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from initlab.diagnose.report import Trace, plot_trace, trace
from initlab.diagnose.watch import first_float

SIDES = 32, 64, 96, 128, 224, 256, 299  # of pictures that are tried, the smallest first
FIRST = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding, nn.RNNBase
FORMS = "torchvision:NAME, timm:NAME, module:factory or file.py:factory"


class RefusedError(Exception):
    """What did not run, and what to write instead."""


def add_command(commands: Any) -> None:
    """Add `trace` to the subcommands of an argparse parser."""
    parser = commands.add_parser(
        "trace",
        help="judge the init of a network",
        description="Trace a network once, and judge its init. Exit status: 0 sound, 1 it has "
        "problems, 2 it did not run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(func=main)
    add = parser.add_argument
    add("model", help=f"{FORMS}; the factory is called, a module object is taken as it is")
    add("arguments", nargs="*", default=[], metavar="key=value", help="for the factory")
    add("--shape", action="append", metavar="3,224,224",
        help="of one input; again for each further one; by default what the model says of itself, "
        "or the smallest that it takes")  # fmt: skip
    add("--ints", type=int, metavar="VOCAB", help="inputs are integers below this, as tokens")
    add("--data", type=Path, metavar="FILE", help="your own batch (.npy or .pt), not noise")
    add("--batch", type=int, default=8, help="number of inputs")
    add("--eval", action="store_true", help="in eval mode")
    add("--seed", type=int, default=0, help="of the weights and of the noise")
    add("--device", default="cpu", help="where the model runs")
    add("--all", action="store_true", help="print all rows")
    add("--json", action="store_true", help="print JSON")
    add("--save", type=Path, metavar="PNG", help="draw the trace into this file")
    add("--traceback", action="store_true", help="show where an error comes from")


def main(args: argparse.Namespace) -> int:
    """Print verdict and table; return 0 if the network is sound, 1 if not, 2 if it did not run."""
    try:
        rows, x = run(args)
    except Exception as error:  # whatever a foreign factory or model raises
        if args.traceback:
            traceback.print_exc()
        text = str(error)
        if not isinstance(error, RefusedError):
            at = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({at.filename}, line {at.lineno})"
        print("initlab trace:", *text.split(), file=sys.stderr)
        return 2
    noise = f"Judged on noise of shape {_shapes(x)}; --data FILE takes your own batch."
    remarks = [] if args.data else [noise]
    problems = rows.problems()
    if args.json:
        found = {
            "problems": [{**asdict(p), "advice": p.advice} for p in problems],
            "remarks": rows.remarks() + remarks,
            "seen": rows.seen(),
            "rows": [asdict(e) for e in rows],
        }
        # JSON has no nan and no infinity
        found = json.loads(json.dumps(found), parse_constant=lambda _: None)
        print(json.dumps(found, indent=1))
    else:
        print(rows.text(fold=not args.all), *remarks, sep="\n\n")
    return 1 if problems else 0


def run(args: argparse.Namespace) -> tuple[Trace, tuple[Tensor, ...]]:
    """Return the trace that the arguments ask for, and what was fed."""
    if args.save and not os.access(args.save.parent, os.W_OK):
        raise RefusedError(f"--save {args.save}: no file can be made there")
    torch.manual_seed(args.seed)
    model = build(args.model, args.arguments).train(not args.eval).to(args.device)
    last: Exception | None = None
    for x in inputs(args, model):
        x = tuple(t.to(args.device) for t in x)
        try:
            if any(is_lazy(p) for p in model.parameters()):
                with torch.no_grad():
                    model(*x)
            rows = _watched(model, x)
            break
        except Exception as error:  # the next shape may do
            last = error
    else:
        hint = "give another --shape, or --ints VOCAB if it takes tokens"
        if "required positional argument" in str(last):
            hint = "give --shape once for each input"
        reason = f"{type(last).__name__}: {str(last).partition(chr(10))[0]}"
        text = f"{args.model} does not run on {_shapes(x)} ({reason}); {hint}"
        raise RefusedError(text) from last
    if args.save:
        figure = plot_trace(rows)
        figure.suptitle(f"{args.model}, {'eval' if args.eval else 'train'} mode")
        figure.savefig(args.save)
    return rows, x


def _shapes(x: tuple[Tensor, ...]) -> str:
    return " and ".join(str(tuple(t.shape)) for t in x)


def build(name: str, arguments: list[str]) -> nn.Module:
    """Return the model that `name` stands for."""
    where, _, what = name.rpartition(":")
    if not where:
        raise RefusedError(f"{name} names no model: write {FORMS}")
    options = dict(map(_option, arguments))
    sys.path.insert(0, str(Path(where).parent if where.endswith(".py") else Path.cwd()))
    try:
        made = _found(where, what)
    except ModuleNotFoundError as error:
        text = f"there is no module {error.name}: install it, or give file.py:factory"
        raise RefusedError(text) from error
    if callable(made) and not isinstance(made, nn.Module):
        made = made(**options)
    if not isinstance(made, nn.Module):
        what = f"{name} gives a {type(made).__name__}"
        raise RefusedError(f"{what}: name a factory that returns a module")
    return made


def _found(where: str, what: str) -> Any:
    """Return the factory or module object of that name."""
    if where == "torchvision":
        return partial(import_module("torchvision.models").get_model, what, weights=None)
    if where == "timm":
        return partial(import_module("timm").create_model, what)
    if where.endswith(".py"):
        home = SimpleNamespace(**runpy.run_path(where, run_name=Path(where).stem))
    else:
        home = import_module(where)  # which may make its names when they are asked for
    if not hasattr(home, what):
        raise RefusedError(f"{where} has no {what}")
    return getattr(home, what)


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise RefusedError(f"{text} is no argument for the factory: write key=value")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def inputs(args: argparse.Namespace, model: nn.Module) -> Iterator[tuple[Tensor, ...]]:
    """Yield the inputs that are to be tried, one after the other."""
    if args.data:
        yield (_read(args.data),)
        return
    config = getattr(model, "config", None)
    first = next((m for m in model.modules() if isinstance(m, FIRST)), None)
    tokens, tried = args.ints, [[_shape(text) for text in args.shape or ()]]
    if not args.shape:
        tokens = tokens or getattr(config, "vocab_size", 0) or getattr(first, "num_embeddings", 0)
        tried = [[shape] for shape in ([(16,)] if tokens else _guessed(model, config, first))]
    g = torch.Generator().manual_seed(args.seed)
    for shapes in tried:
        sizes = [(args.batch, *shape) for shape in shapes]
        yield tuple(
            torch.randint(tokens, size, generator=g) if tokens else torch.randn(size, generator=g)
            for size in sizes
        )


def _guessed(model: nn.Module, config: Any, first: nn.Module | None) -> list[tuple[int, ...]]:
    """Return shapes that the model may take, by what it says of itself and its first layer."""
    known = getattr(model, "pretrained_cfg", None) or {}
    if "input_size" in known:
        return [known["input_size"]]
    if isinstance(first, nn.Linear | nn.RNNBase):
        size = first.in_features if isinstance(first, nn.Linear) else first.input_size
        return [(size,), (16, size)]
    channels = getattr(first, "in_channels", 0) or 3  # lazy layers have 0
    dims = 1 if isinstance(first, nn.Conv1d) else 3 if isinstance(first, nn.Conv3d) else 2
    sides = [config.image_size] if hasattr(config, "image_size") else SIDES
    return [(channels, *[side] * dims) for side in sides]


def _shape(text: str) -> list[int]:
    try:
        return [int(size) for size in text.replace("x", ",").split(",")]
    except ValueError:
        raise RefusedError(f"--shape {text} is no shape: write it as in 3,224,224") from None


def _read(path: Path) -> Tensor:
    """Read a batch, without running code that a file may hold."""
    if path.suffix == ".npy":
        import numpy as np

        x = torch.from_numpy(np.load(path, allow_pickle=False))
    else:
        x = torch.load(path, weights_only=True)
    if not isinstance(x, Tensor):
        raise RefusedError(f"{path} holds a {type(x).__name__}: save one tensor")
    return x.float() if x.is_floating_point() else x


def _watched(model: nn.Module, x: tuple[Tensor, ...]) -> Trace:
    """Trace, with a progress bar over the modules after two seconds."""
    total = sum(1 for _ in model.modules())
    with tqdm(total=total, delay=2, leave=False, desc="forward", unit=" modules") as bar:
        hook = register_module_forward_hook(lambda *_: bar.update() and None)
        try:
            return trace(model, x, loss=random_direction)
        finally:
            hook.remove()


def random_direction(output: Any) -> Tensor:
    """Return a loss whose gradient is as large for any output."""
    y = first_float(output)
    if y is None:
        raise RefusedError("the model returns no tensor of real numbers, so there is no loss")
    return (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)).sum()
