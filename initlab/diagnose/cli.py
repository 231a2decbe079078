"""`initlab trace`: the verdict on a network from a shell."""

import argparse
import ast
import dataclasses
import importlib.util
import json
import math
import sys
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from initlab.diagnose.report import Trace, plot_trace, trace
from initlab.diagnose.watch import first_float

SIDES = 32, 64, 96, 128, 224, 256, 299  # of pictures that are tried, the smallest first


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
    add = parser.add_argument
    add("model", help="torchvision:NAME, timm:NAME, module:factory or file.py:factory; the factory "
        "is called, a module object is taken as it is")  # fmt: skip
    add("arguments", nargs="*", default=[], metavar="key=value", help="for the factory")
    add("--shape", action="append", metavar="3,224,224",
        help="of one input; again for each further one; by default what the model says of itself, "
        "or the smallest that it takes")  # fmt: skip
    add("--ints", type=int, metavar="VOCAB", help="inputs are integers below this, as tokens")
    add("--data", metavar="FILE", help="your own batch (.npy or .pt) in place of noise")
    add("--batch", type=int, default=8, help="number of inputs")
    add("--eval", action="store_true", help="in eval mode")
    add("--seed", type=int, default=0, help="of the weights and of the noise")
    add("--device", default="cpu", help="where the model runs")
    add("--all", action="store_true", help="print all rows")
    add("--json", action="store_true", help="print JSON")
    add("--save", metavar="PNG", help="draw the trace into this file")
    add("--traceback", action="store_true", help="show where an error comes from")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Print verdict and table; return 0 if the network is sound, 1 if not, 2 if it did not run."""
    try:
        rows, x = run(args)
    except Exception as error:  # whatever a foreign factory or model raises
        if args.traceback:
            traceback.print_exc()
        text = str(error) if isinstance(error, RefusedError) else f"{type(error).__name__}: {error}"
        print(f"initlab trace: {' '.join(text.split())}", file=sys.stderr)
        return 2
    problems = rows.problems()
    if args.json:
        print(json.dumps(_plain(rows), indent=1))
    else:
        print(rows.text(fold=not args.all))
        if args.data is None:
            shapes = " and ".join(str(tuple(t.shape)) for t in x)
            print(f"\nJudged on noise of shape {shapes}; --data FILE takes your own batch.")
    return 1 if problems else 0


def run(args: argparse.Namespace) -> tuple[Trace, tuple[Tensor, ...]]:
    """Return the trace that the arguments ask for, and what was fed."""
    if args.save:
        _try_to_write(Path(args.save))
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
        shapes = " and ".join(str(tuple(t.shape)) for t in x)
        hint = "give another --shape, or --ints VOCAB if it takes tokens"
        if "required positional argument" in str(last):
            hint = "give --shape once for each input"
        reason = str(last).partition("\n")[0]
        text = f"{args.model} does not run on {shapes} ({type(last).__name__}: {reason}); {hint}"
        raise RefusedError(text) from last
    if args.save:
        figure = plot_trace(rows)
        figure.suptitle(f"{args.model}, {'eval' if args.eval else 'train'} mode")
        figure.savefig(args.save)
    return rows, x


def build(name: str, arguments: list[str]) -> nn.Module:
    """Return the model that `name` stands for."""
    where, _, what = name.rpartition(":")
    if not where:
        forms = "torchvision:NAME, timm:NAME, module:factory or file.py:factory"
        raise RefusedError(f"{name} names no model: write {forms}")
    options = dict(_option(a) for a in arguments)
    sys.path.insert(0, str(Path(where).parent if where.endswith(".py") else Path.cwd()))
    try:
        if where == "torchvision":
            made = import_module("torchvision.models").get_model(what, weights=None, **options)
        elif where == "timm":
            made = import_module("timm").create_model(what, **options)
        else:
            made = getattr(_module(where), what, None)
            if made is None:
                raise RefusedError(f"{where} has no {what}")
            if not isinstance(made, nn.Module):
                made = made(**options) if callable(made) else made
    except ModuleNotFoundError as error:
        raise RefusedError(
            f"there is no module {error.name}: install it, or give file.py:factory"
        ) from error
    except RefusedError:
        raise
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{name} raises {type(error).__name__}: {error} ({at.filename}, line {at.lineno})"
        raise RefusedError(text) from error
    if not isinstance(made, nn.Module):
        raise RefusedError(
            f"{name} gives a {type(made).__name__}: name a factory that returns a module"
        )
    return made


def _module(where: str) -> Any:
    if not where.endswith(".py"):
        return import_module(where)
    spec = importlib.util.spec_from_file_location(Path(where).stem, where)
    if spec is None or spec.loader is None or not Path(where).exists():
        raise RefusedError(f"there is no file {where}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
        yield (_read(Path(args.data)),)
        return
    g = torch.Generator().manual_seed(args.seed)
    vocabulary = args.ints

    def noise(*shape: int) -> Tensor:
        if vocabulary:
            return torch.randint(vocabulary, (args.batch, *shape), generator=g)
        return torch.randn((args.batch, *shape), generator=g)

    if args.shape:
        yield tuple(noise(*_shape(text)) for text in args.shape)
        return
    config = getattr(model, "config", None)
    known = getattr(model, "pretrained_cfg", None) or {}
    first = next((m for m in model.modules() if isinstance(m, FIRST)), None)
    vocabulary = vocabulary or getattr(config, "vocab_size", None)
    if isinstance(first, nn.Embedding):
        vocabulary = vocabulary or first.num_embeddings
    if vocabulary:
        yield (noise(16),)
    elif "input_size" in known:
        yield (noise(*known["input_size"]),)
    elif isinstance(first, nn.Linear | nn.RNNBase):
        size = first.in_features if isinstance(first, nn.Linear) else first.input_size
        yield (noise(size),)
        yield (noise(16, size),)
    else:
        channels = getattr(first, "in_channels", 0) or 3
        dims = 1 if isinstance(first, nn.Conv1d) else 3 if isinstance(first, nn.Conv3d) else 2
        sides = [config.image_size] if hasattr(config, "image_size") else SIDES
        yield from ((noise(channels, *[side] * dims),) for side in sides)


FIRST = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding, nn.RNNBase


def _shape(text: str) -> list[int]:
    try:
        return [int(size) for size in text.replace("x", ",").split(",")]
    except ValueError:
        raise RefusedError(f"--shape {text} is no shape: write it as in 3,224,224") from None


def _read(path: Path) -> Tensor:
    """Read a batch, without running code that a file may hold."""
    if not path.exists():
        raise RefusedError(f"there is no file {path}")
    if path.suffix == ".npy":
        import numpy as np

        x = torch.from_numpy(np.load(path, allow_pickle=False))
    else:
        x = torch.load(path, weights_only=True)
    if not isinstance(x, Tensor):
        raise RefusedError(f"{path} holds a {type(x).__name__}: save one tensor")
    return x.float() if x.is_floating_point() else x


def _try_to_write(path: Path) -> None:
    there = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise RefusedError(f"--save {path}: {error.strerror}") from error
    if not there:
        path.unlink()


def _watched(model: nn.Module, x: tuple[Tensor, ...]) -> Trace:
    """Trace, with a progress bar over the modules after two seconds."""
    leaves = [m for m in model.modules() if not any(True for _ in m.children())]
    with tqdm(total=len(leaves), delay=2, leave=False, desc="forward", unit=" modules") as bar:
        hooks = [m.register_forward_hook(lambda *_: bar.update() and None) for m in leaves]
        try:
            return trace(model, x, loss=random_direction)
        finally:
            for hook in hooks:
                hook.remove()


def random_direction(output: Any) -> Tensor:
    """Return a loss whose gradient is as large for any output."""
    y = first_float(output)
    if y is None:
        raise RefusedError("the model returns no tensor of real numbers, so there is no loss")
    return (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)).sum()


def _plain(rows: Trace) -> dict[str, Any]:
    """Return what JSON can hold: nan and infinities become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    problems = [{**dataclasses.asdict(p), "advice": p.advice} for p in rows.problems()]
    found = {"problems": problems, "remarks": rows.remarks(), "seen": rows.seen()}
    return plain(found | {"rows": [dataclasses.asdict(e) for e in rows]})
