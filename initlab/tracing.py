"""What a signal looks like after every layer of a model, forward and backward, and a verdict."""

import argparse
import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import import_module
from itertools import groupby
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules import activation
from torch.nn.modules.batchnorm import _NormBase  # of InstanceNorm, too
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from initlab.verdict import ROUNDING, Problem, diagnose

# MultiheadAttention sits among the activations, but mixes positions and has weights.
ACTIVATIONS = tuple(
    getattr(activation, name) for name in activation.__all__ if name != "MultiheadAttention"
)
ROLES: dict[str, tuple[type[nn.Module], ...]] = {  # of what is traced
    "layer": (_ConvNd, nn.Linear),
    "mixer": (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Embedding, nn.EmbeddingBag),
    "norm": (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
    "activation": ACTIVATIONS,
}
# Also traced when called as functions or methods, in place (relu_) or not. Softmax and its kin are
# not elementwise, and attention calls them for its weights: left out.
FUNCTIONS = {a.__name__.lower() for a in ACTIVATIONS if "softm" not in a.__name__.lower()}
# Those that put out 0 for all inputs far below 0, and pass no gradient there.
DYING = {"relu", "relu6", "hardswish", "hardsigmoid", "threshold", "gelu", "silu", "mish"}
WEIGHTS = {"weight", "in_proj_weight", "weight_ih_l0", "weight_ih"}  # a layer has one of them


@dataclass(frozen=True)
class LayerTrace:
    """The numbers of one call of one layer.

    Attributes:
        name: Qualified name in the model, or the class if the model is itself the layer; `"act#2"`
            for the second call, `"block.relu"` for a function that the module `"block"` calls.
        kind: Class name of the layer, or name of the function.
        shape: Shape of the output.
        mean: Mean of the output over everything: inputs, channels, positions.
        std: Its unbiased standard deviation over everything.
        rms: Its root mean square.
        signal: Standard deviation *across inputs* (the first dimension): root of the mean, over
            channels and positions, of the unbiased variance; `nan` for a single input.
        grad_rms: Rms of the gradient of the loss with respect to the output; None without a loss
            or when the loss does not depend on the output.
        weight_grad_rms: The same for `weight` (the first layer's input weights of an LSTM, the
            input projection of an attention), summed over all its uses; None also when there is
            none, or it is frozen or reparametrised.
        dead: Share of the features (channels) that are 0 for every input and position, for
            activations that can die; None for others.
        signs: For these, how many features have an input that is never above 0, and never below
            (each but those where it is 0 throughout).
        in_rms: Rms of the first input; nan if that is not a tensor of real numbers.
        in_signal: The signal of the first input.
        role: "layer" (convolution, linear), "activation", "norm" (divides by what it measures),
            "affine" (BatchNorm in eval mode, which only scales) or "mixer" (attention, recurrent,
            embedding).
        features: Number of features (channels): along dimension 1 after convolutions, BatchNorm
            and GroupNorm, along the last after the others; activations keep what came before.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    mean: float
    std: float
    rms: float
    signal: float
    grad_rms: float | None = None
    weight_grad_rms: float | None = None
    dead: float | None = None
    signs: tuple[int, int] | None = field(default=None, repr=False)
    in_rms: float = field(default=math.nan, repr=False)
    in_signal: float = field(default=math.nan, repr=False)
    role: str = field(default="layer", repr=False)
    features: int = field(default=1, repr=False)


class Trace(list[LayerTrace]):
    """A list of `LayerTrace`, in the order of execution, that prints as a verdict and a table."""

    def problems(self) -> list[Problem]:
        """Return what is wrong, first cause first; see `initlab.verdict` for the thresholds.

        Example:
            >>> model = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 2))
            >>> _ = nn.init.constant_(model[0].bias, -10)
            >>> [(p.layer, p.kind, p.value) for p in trace(model, torch.randn(8, 9)).problems()]
            [('0', 'dead', 1.0)]
        """
        return diagnose(self)

    def to_frame(self) -> pd.DataFrame:
        """Return all rows and numbers as a DataFrame, by name of the layer."""
        return pd.DataFrame(self).set_index("name")

    def __repr__(self) -> str:
        problems = self.problems()
        numbers = ["mean", "std", "rms", "signal", "grad_rms", "weight_grad_rms", "dead"]
        numbers = [n for n in numbers if any(getattr(e, n) is not None for e in self)]
        table = [["name", "kind", "shape", *numbers]]
        for e in self:
            if abs(e.mean) < ROUNDING * e.rms:  # another processor would print another number
                e = dataclasses.replace(e, mean=0.0)
            table.append([e.name, e.kind, str(e.shape)] + [_number(getattr(e, n)) for n in numbers])
        columns = []
        for k, column in enumerate(zip(*table, strict=True)):
            width = max(map(len, column))
            # 9 characters hold any number (-1.23e-05), so that tables of different models line up.
            columns.append([c.ljust(width) if k < 3 else c.rjust(max(width, 9)) for c in column])
        header, *lines = map("  ".join, zip(*columns, strict=True))
        # Shown are both ends and the rows next to a problem; long runs of others are folded.
        named = {p.layer for p in problems}
        shown = {i + k for i, e in enumerate(self) if e.name in named for k in (-1, 0, 1)}
        shown |= {*range(5), *range(len(self) - 5, len(self))}
        folded = [header]
        for keep, group in groupby(range(len(self)), lambda i: i in shown):
            run = list(group)
            if keep or len(run) < 3:
                folded += [lines[i] for i in run]
            else:
                sizes = [self[i].rms for i in run]
                low, high = _number(min(sizes)), _number(max(sizes))
                folded.append(f"... {len(run)} rows, rms {low} to {high}")
        count = f"{len(problems) or 'no'} problem{'s' * (len(problems) != 1)} found"
        return "\n".join([count, *map(str, problems), "", *folded])


class _Watch(TorchFunctionMode):
    """Hooks, and a mode that sees calls of functions, which measure while the model runs."""

    def __init__(self, model: nn.Module, backward: bool) -> None:
        super().__init__()
        self.paths = {module: name for name, module in model.named_modules()}
        self.backward = backward
        self.running: list[tuple[nn.Module, dict[str, Any]]] = []
        self.channels_last = False
        self.calls: Counter[str] = Counter()
        self.rows: list[tuple[dict[str, Any], Tensor | None]] = []  # with the layer's weight
        self.starts: list[Tensor] = []  # of the graph, besides the parameters

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        role = _role(module)
        known = self.given(type(module).__name__, role, (args, kwargs)) if role else {}
        self.running.append((module, known))

    def after(self, module: nn.Module, _args: Any, output: Any) -> Any:
        while (entry := self.running.pop())[0] is not module:
            pass  # a module inside it raised, and the model caught that
        if not (known := entry[1]):
            return None
        if self.backward and isinstance(output, Tensor) and not output.requires_grad:
            # All before it is frozen: the output starts the graph itself.
            self.starts.append(output.detach().requires_grad_())
            output = self.starts[-1].clone()
        own = module.named_parameters(recurse=False)
        weight = next((parameter for name, parameter in own if name in WEIGHTS), None)
        if known["role"] != "activation":
            # Not subclasses of the norms: torchvision's LayerNorm2d has channels in dimension 1
            last = isinstance(module, nn.Linear) or type(module) in (nn.LayerNorm, nn.RMSNorm)
            self.channels_last = last or known["role"] == "mixer"
        self.add(self.paths[module] or type(module).__name__, known, output, weight)
        return output

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs, kind = kwargs or {}, getattr(func, "__name__", "").replace("_", "")
        caller, traced = self.running[-1] if self.running else (None, {})
        if kind not in FUNCTIONS or traced:  # nn.ReLU has its row already
            return func(*args, **kwargs)
        known = self.given(kind, "activation", (args, kwargs))
        output = func(*args, **kwargs)
        path = self.paths.get(caller, "")
        self.add(f"{path}.{kind}" if path else kind, known, output, None)
        return output

    def given(self, kind: str, role: str, inputs: Any) -> dict[str, Any]:
        """Measure the first input, before a layer that works in place overwrites it."""
        known: dict[str, Any] = {"kind": kind, "role": role}
        x = _first(inputs)
        if x is None:
            return known
        known |= {f"in_{key}": value for key, value in _sizes(x).items()}
        if kind.lower() in DYING:
            low, high = _by_feature(x, self.channels_last).aminmax(dim=1)
            below, above = (high <= 0) & (low < 0), (low >= 0) & (high > 0)
            known["signs"] = (int(below.sum()), int(above.sum()))
        return known

    def add(self, name: str, known: dict[str, Any], output: Any, weight: Tensor | None) -> None:
        """Add a row for the first tensor of `output`."""
        y = _first(output)
        if y is None:
            return
        self.calls[name] += 1
        name += f"#{self.calls[name]}" if self.calls[name] > 1 else ""
        v, features = y.detach().double(), _by_feature(y, self.channels_last)
        # Divisions of 0 by 0 give nan quietly, where torch.std and torch.var would warn.
        std = ((v - v.mean()).square().sum() / (v.numel() - 1)).sqrt().item()
        row = {"name": name, **known, "shape": tuple(y.shape), "mean": v.mean().item(), "std": std}
        row |= {**_sizes(y), "features": len(features)}
        if known["kind"].lower() in DYING:
            row["dead"] = (features == 0).all(1).double().mean().item()
        self.rows.append((row, weight))
        if self.backward and y.requires_grad:
            # Such a hook still sees the gradient of this value when y is overwritten in place.
            y.register_hook(lambda grad: row.update(grad_rms=_sizes(grad)["rms"]))


def trace(
    model: nn.Module,
    x: Any,
    target: Any = None,
    loss: Callable[..., Tensor] | None = None,
) -> Trace:
    """Run `model(x)` once and measure the output of every layer, and its gradient.

    Layers are convolutions, `nn.Linear`, attention, recurrent layers, embeddings, normalisation and
    activations, as modules or called as functions (`F.relu(h)`, `h.tanh()`), in the order of
    execution. Of several tensors that a layer returns, the first counts. The model runs in the mode
    it is in; it, its `.grad`, buffers and hooks, `x` and torch's random state are left as they
    were, also when an exception passes. Sums are in float64; without a loss no activation is kept.

    Args:
        model: Any module.
        x: Inputs `(n, ...)`: a tensor, a tuple of arguments or a dict of keyword arguments. The
            first dimension of every output is taken for `n`.
        target: What the loss compares the output with.
        loss: `loss(output, target)`, or `loss(output)` when `target` is None, returning a scalar.

    Raises:
        ValueError: If `x` is empty, if the model has parameters without a shape (lazy), if no such
            layer ran, if the loss is not a scalar or does not depend on any layer or parameter, or
            if there is a target without a loss.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU(inplace=True))
        >>> _ = nn.init.ones_(model[0].weight)
        >>> trace(model, torch.tensor([[1.0, 2.0], [-4.0, 3.0]]))
        no problems found
        <BLANKLINE>
        name  kind    shape        mean        std        rms     signal       dead
        0     Linear  (2, 1)       1.00       2.83       2.24       2.83          -
        1     ReLU    (2, 1)       1.50       2.12       2.12       2.12       0.00
    """
    if loss is None and target is not None:
        raise ValueError("target given without a loss")
    for tensor in _tensors(x):
        if not tensor.numel():
            raise ValueError(f"x is empty, of shape {tuple(tensor.shape)}")
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise ValueError("the model has layers without a shape (lazy); run it once")
    watch = _Watch(model, backward=loss is not None)
    devices = {t.device for t in (*_tensors(x), *model.parameters()) if t.is_cuda}

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().clone()
        if loss is not None and value.is_floating_point():
            watch.starts.append(value.requires_grad_())
            value = value.clone()  # which the model may change in place
        return value

    with (
        torch.random.fork_rng(devices=devices),
        torch.inference_mode(False),
        torch.set_grad_enabled(loss is not None),
    ):
        # BatchNorm updates copies of its buffers; functional_call puts the originals back.
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        args, kwargs = ((), dict(x)) if isinstance(x, Mapping) else (x, {})
        args, kwargs = tree_map(copy, args), tree_map(copy, kwargs)
        with ExitStack() as hooks:
            for m in watch.paths:
                hooks.enter_context(m.register_forward_pre_hook(watch.before, with_kwargs=True))
                hooks.enter_context(m.register_forward_hook(watch.after))
            # In this mode nn.TransformerEncoder does not take its fast path, past its modules.
            hooks.enter_context(watch)
            output = torch.func.functional_call(model, buffers, args, kwargs)
        if not watch.rows:
            raise ValueError("no layer or activation ran: nothing to trace")
        if loss is not None:
            value = loss(output) if target is None else loss(output, target)
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
                raise ValueError(f"the loss must be a scalar tensor, got {got}")
            if not value.requires_grad:
                raise ValueError("the loss does not depend on any layer or parameter")
            trained = [p for p in model.parameters() if p.requires_grad]
            # Not value.backward(): that would add to the .grad of the parameters.
            grads = torch.autograd.grad(value, [*trained, *watch.starts], allow_unused=True)
            by_weight = dict(zip(trained, grads, strict=False))
            for row, weight in watch.rows:
                if (grad := by_weight.get(weight)) is not None:
                    row["weight_grad_rms"] = _sizes(grad)["rms"]
    return Trace(LayerTrace(**row) for row, _ in watch.rows)


def _sizes(y: Tensor) -> dict[str, float]:
    v = torch.atleast_1d(y.detach().double())
    across = (v - v.mean(0)).square().sum() / ((len(v) - 1) * (v.numel() / len(v)))
    return {"rms": v.square().mean().sqrt().item(), "signal": across.sqrt().item()}


def _by_feature(y: Tensor, channels_last: bool) -> Tensor:
    """Return y as (features, all else)."""
    axis = -1 if channels_last else 1
    return y.detach().movedim(axis, 0).flatten(1) if y.dim() > 1 else y.detach().reshape(-1, 1)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    for item in value if isinstance(value, tuple | list) else ():
        yield from _tensors(item)


def _first(value: Any) -> Tensor | None:
    """Return the first tensor of real numbers, unless it is empty or there is none."""
    y = next((y for y in _tensors(value) if y.is_floating_point()), None)
    return None if y is None or not y.numel() else y


def _role(module: nn.Module) -> str | None:
    if isinstance(module, _NormBase) and not module.training and module.running_mean is not None:
        return "affine"
    return next((role for role, kinds in ROLES.items() if isinstance(module, kinds)), None)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:#.3g}".removesuffix(".")


def add_command(commands: Any) -> None:
    """Add `trace` to the subcommands of an argparse parser."""
    parser = commands.add_parser(
        "trace",
        help="judge the init of a network",
        description="Trace a network on random inputs. The exit status is 1 if it has a problem.",
    )
    parser.add_argument("model", help="torchvision:NAME, or module:factory")
    parser.add_argument("--shape", default="3,224,224", help="of one input, as in 3,224,224")
    parser.add_argument("--batch", type=int, default=8, help="number of inputs")
    parser.add_argument("--eval", action="store_true", help="in eval mode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", metavar="PNG", help="draw the trace into this file")
    parser.set_defaults(func=main_trace)


def main_trace(args: argparse.Namespace) -> int:
    """Print verdict and table; return 0 if the network is sound, 1 if not, 2 if it does not run."""
    torch.manual_seed(args.seed)
    try:
        module, _, name = args.model.partition(":")
        shape = [int(size) for size in args.shape.split(",")]
        module = "torchvision.models" if module == "torchvision" else module
        model = getattr(import_module(module), name)()
        if not isinstance(model, nn.Module):
            raise TypeError(f"{args.model} gives a {type(model).__name__}, not a module")
        x = torch.randn(args.batch, *shape)
        rows = trace(model.train(not args.eval), x, loss=_random_direction)
        if args.save:
            from initlab.page import plot_trace  # which imports this module

            plot_trace(rows).savefig(args.save)
    except Exception as error:  # whatever a foreign factory or model raises
        message = str(error).partition("\n")[0]
        print(f"initlab trace: {type(error).__name__}: {message}", file=sys.stderr)
        return 2
    print(rows)
    return 1 if rows.problems() else 0


def _random_direction(output: Any) -> Tensor:
    """Return a loss whose gradient is as large for any output."""
    y = _first(output)
    return (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)).sum()
