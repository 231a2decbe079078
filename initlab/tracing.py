"""What a signal looks like after every layer of a model, forward and backward, and a verdict."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules import activation, batchnorm, instancenorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from initlab.verdict import Problem, diagnose

LAYERS: tuple[type[nn.Module], ...] = (_ConvNd, nn.Linear)
MIXERS = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Embedding, nn.EmbeddingBag)
BATCH_NORMS = (batchnorm._NormBase, instancenorm._InstanceNorm)
NORMS = (*BATCH_NORMS, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
# MultiheadAttention sits among the activations, but mixes positions and has weights.
ACTIVATIONS = tuple(
    getattr(activation, name) for name in activation.__all__ if name != "MultiheadAttention"
)
TRACED = (*LAYERS, *MIXERS, *NORMS, *ACTIVATIONS)
# Called as functions or methods, in place (relu_) or not. Softmax is not elementwise: left out.
FUNCTIONS = frozenset(
    "relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish softplus softsign hardswish "
    "hardsigmoid hardtanh tanh sigmoid logsigmoid tanhshrink softshrink hardshrink threshold glu"
    .split()
)
# Those that put out 0 for all inputs far below 0 (or around it), with a gradient of 0.
DYING = frozenset(
    "relu relu6 hardswish hardsigmoid threshold softshrink hardshrink gelu silu mish".split()
)
WEIGHTS = ("weight", "in_proj_weight", "weight_ih_l0", "weight_ih")


@dataclass(frozen=True)
class LayerTrace:
    """The numbers of one call of one layer.

    Attributes:
        name: Qualified name in the model, `"act#2"` for the second call of `"act"`; the class
            name when the model is itself the layer. An activation called as a function is named
            after the module that calls it: `"block.relu"`.
        kind: Class name of the layer, or name of the function.
        shape: Shape of the output.
        mean: Mean of the output over everything: inputs, channels, positions.
        std: Unbiased standard deviation of the output over everything.
        rms: Root of the mean square of the output.
        signal: Standard deviation *across inputs* (the first dimension): root of the mean, over
            channels and positions, of the unbiased variance; `nan` for a single input.
        grad_rms: Rms of the gradient of the loss with respect to the output; None without a loss
            or when the loss does not depend on the output.
        weight_grad_rms: Rms of the gradient with respect to `weight` (the first layer's input
            weights of an LSTM, the input projection of an attention), summed over all its uses;
            None without a loss, a weight, or when the weight is frozen or reparametrised.
        dead: Share of the features (channels) that are 0 for every input and position, for
            activations that can die; None for others.
        signs: For these, the number of features whose input is never above 0, and never below 0
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
        """Return what is wrong, first cause first; see `initlab.verdict` for the thresholds."""
        return diagnose(self)

    def to_frame(self) -> pd.DataFrame:
        """Return all rows and numbers as a DataFrame, by name of the layer."""
        return pd.DataFrame([dataclasses.asdict(e) for e in self]).set_index("name")

    def __repr__(self) -> str:
        problems = self.problems()
        numbers = ["mean", "std", "rms", "signal", "grad_rms", "weight_grad_rms", "dead"]
        numbers = [n for n in numbers if any(getattr(e, n) is not None for e in self)]
        rows = [["name", "kind", "shape", *numbers]]
        rows += [
            [e.name, e.kind, str(e.shape), *(_number(getattr(e, n)) for n in numbers)]
            for e in self
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        # 9 characters hold any number (-1.23e-05), so that tables of different models line up.
        widths[3:] = [max(width, 9) for width in widths[3:]]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        named = {p.layer for p in problems}
        edge = (*range(4), *range(len(self) - 4, len(self)))
        shown = {i for i, e in enumerate(self) if i in edge or e.name in named}
        shown |= {i + step for i in shown for step in (-1, 1)}
        folded = lines[:1]
        start = 0
        for i in [*sorted(shown), len(self)]:
            if i - start > 2:  # a run of rows without a problem
                low, *_, high = sorted(e.rms for e in self[start:i])
                folded.append(f"... {i - start} rows alike, rms {_number(low)} to {_number(high)}")
            else:
                folded += lines[1 + start : 1 + i]
            folded += lines[1 + i : 2 + i] if 0 <= i < len(self) else []
            start = max(start, i + 1)
        verdict = [f"{len(problems) or 'no'} problem{'s' * (len(problems) != 1)} found"]
        return "\n".join([*verdict, *map(str, problems), "", *folded])


class _Watch(TorchFunctionMode):
    """Hooks and a function mode that measure while the model runs."""

    def __init__(self, model: nn.Module, backward: bool) -> None:
        super().__init__()
        self.names = {m: name or type(m).__name__ for name, m in model.named_modules()}
        self.paths = {m: name for name, m in model.named_modules()}
        self.backward = backward
        self.running: list[tuple[nn.Module, dict[str, Any]]] = []
        self.calls: Counter[str] = Counter()
        self.rows: list[dict[str, Any]] = []
        self.weights: list[Tensor | None] = []
        self.starts: list[Tensor] = []
        self.channels_last = False

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        kind = type(module).__name__
        known = self.given(kind, (args, kwargs)) if isinstance(module, TRACED) else {}
        self.running.append((module, known))

    def after(self, module: nn.Module, _args: Any, output: Any) -> Any:
        while (entry := self.running.pop())[0] is not module:
            pass  # a module inside it raised, and the model caught that
        if not isinstance(module, TRACED):
            return None
        if self.backward and isinstance(output, Tensor) and not output.requires_grad:
            # All before it is frozen: the output starts the graph itself.
            output = output.detach()
            if output.is_floating_point() and torch.is_grad_enabled():
                self.starts.append(output.requires_grad_())
                output = output.clone()
        own = dict(module.named_parameters(recurse=False))
        weight = next((own[name] for name in WEIGHTS if name in own), None)
        known = {"kind": type(module).__name__, "role": _role(module), **entry[1]}
        self.row(self.names[module], known, output, weight)
        return output

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = getattr(func, "__name__", "").rstrip("_")
        caller = self.running[-1][0] if self.running else None
        if name not in FUNCTIONS or isinstance(caller, TRACED):  # nn.ReLU has a row already
            return func(*args, **(kwargs or {}))
        known = {"kind": name, "role": "activation", **self.given(name, (args, kwargs))}
        output = func(*args, **(kwargs or {}))
        path = self.paths.get(caller, "")
        self.row(f"{path}.{name}" if path else name, known, output, None)
        return output

    def given(self, kind: str, inputs: Any) -> dict[str, Any]:
        """Measure the first input, before a module that works in place overwrites it."""
        x = next(_tensors(inputs), None)
        if x is None or not x.numel():
            return {}
        rms, signal = _sizes(x)
        known: dict[str, Any] = {"in_rms": rms, "in_signal": signal}
        if kind.lower() in DYING:
            low, high = (f(_by_feature(x, self.channels_last), 1) for f in (torch.amin, torch.amax))
            known["signs"] = tuple(
                ((a <= 0) & (b < 0)).sum().item() for a, b in ((high, low), (-low, -high))
            )
        return known

    def row(self, name: str, known: dict[str, Any], output: Any, weight: Tensor | None) -> None:
        y = next(_tensors(output), None)
        if y is None or not y.numel():
            return
        self.calls[name] += 1
        if self.calls[name] > 1:
            name += f"#{self.calls[name]}"
        kind = known["kind"]
        if known["role"] != "activation":
            last = ("Linear", "LayerNorm", "RMSNorm")
            self.channels_last = known["role"] == "mixer" or kind in last
        row = {"name": name, **known, **_forward(y.detach())}
        features = _by_feature(y.detach(), self.channels_last)
        row["features"] = len(features)
        if kind.lower() in DYING:
            row["dead"] = (features == 0).all(1).double().mean().item()
        self.rows.append(row)
        self.weights.append(weight if weight is not None and weight.requires_grad else None)
        if self.backward and y.requires_grad:
            # Such a hook still sees the gradient of this value when y is overwritten in place.
            y.register_hook(lambda grad: row.update(grad_rms=_rms(grad)))


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
        >>> trace(model, torch.tensor([[1.0, 2.0], [-4.0, 3.0]]), loss=torch.sum)
        no problems found
        <BLANKLINE>
        name  kind    shape        mean        std        rms     signal   grad_rms  weight_grad_rms       dead
        0     Linear  (2, 1)       1.00       2.83       2.24       2.83      0.707             1.58          -
        1     ReLU    (2, 1)       1.50       2.12       2.12       2.12       1.00                -       0.00
    """
    if loss is None and target is not None:
        raise ValueError("target given without a loss")
    for tensor in _tensors(x, real=False):
        if tensor.numel() == 0:
            raise ValueError(f"x is empty, of shape {tuple(tensor.shape)}")
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise ValueError("the model has layers without a shape (lazy); run it once")
    watch = _Watch(model, backward=loss is not None)
    devices = {t.device for t in (*_tensors(x, real=False), *model.parameters()) if t.is_cuda}
    fast = torch.backends.mha.get_fastpath_enabled()

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().clone()
        if loss is None or not value.is_floating_point():
            return value
        watch.starts.append(value.requires_grad_())
        return value.clone()  # which the model may change in place

    with (
        torch.random.fork_rng(devices=devices),
        torch.inference_mode(False),
        torch.set_grad_enabled(loss is not None),
    ):
        with ExitStack() as hooks:
            # In eval mode a transformer's fast path would pass its modules by.
            hooks.callback(torch.backends.mha.set_fastpath_enabled, fast)
            torch.backends.mha.set_fastpath_enabled(False)
            for module in watch.names:
                hooks.enter_context(
                    module.register_forward_pre_hook(watch.before, with_kwargs=True)
                )
                hooks.enter_context(module.register_forward_hook(watch.after))
            # BatchNorm updates copies of its buffers; functional_call puts the originals back.
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            arguments = tree_map(copy, x)
            args = arguments if isinstance(x, tuple) else () if isinstance(x, dict) else (arguments,)
            hooks.enter_context(watch)
            output = torch.func.functional_call(
                model, buffers, args, arguments if isinstance(x, dict) else None
            )
        if not watch.rows:
            raise ValueError("no layer or activation ran: nothing to trace")
        if loss is not None:
            _backward(watch, loss(output) if target is None else loss(output, target), model)
    return Trace(LayerTrace(**row) for row in watch.rows)


def _backward(watch: _Watch, value: Any, model: nn.Module) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(f"the loss must be a scalar tensor, got {_describe(value)}")
    if not value.requires_grad:
        raise ValueError("the loss does not depend on any layer or parameter")
    trained = [p for p in model.parameters() if p.requires_grad]
    # Not value.backward(): that would add to the .grad of the parameters.
    grads = torch.autograd.grad(value, [*trained, *watch.starts], allow_unused=True)
    by_weight = dict(zip(trained, grads, strict=False))
    for row, weight in zip(watch.rows, watch.weights, strict=True):
        if by_weight.get(weight) is not None:
            row["weight_grad_rms"] = _rms(by_weight[weight])


def _forward(y: Tensor) -> dict[str, Any]:
    shape, v = tuple(y.shape), y.double()
    mean = v.mean()
    # Divisions of 0 by 0 give nan quietly, where torch.std and torch.var would warn.
    std = ((v - mean).square().sum() / (v.numel() - 1)).sqrt()
    rms, signal = _sizes(y)
    return {"shape": shape, "mean": mean.item(), "std": std.item(), "rms": rms, "signal": signal}


def _sizes(y: Tensor) -> tuple[float, float]:
    """Return rms and signal."""
    v = y.detach().double()
    if not v.dim():
        return v.abs().item(), math.nan
    across = (v - v.mean(0)).square().sum() / ((len(v) - 1) * (v.numel() / len(v)))
    return v.square().mean().sqrt().item(), across.sqrt().item()


def _by_feature(y: Tensor, channels_last: bool) -> Tensor:
    """Return y as (features, all else)."""
    if y.dim() < 2:
        return y.detach().reshape(-1, 1)
    return y.detach().movedim(-1 if channels_last else 1, 0).flatten(1)


def _tensors(value: Any, real: bool = True) -> Iterator[Tensor]:
    """Yield the tensors in tuples, lists, dicts and dataclasses; real numbers only if asked."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or not real:
            yield value
        return
    if isinstance(value, Mapping):
        value = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, f.name) for f in dataclasses.fields(value)]
    for item in value if isinstance(value, tuple | list) else ():
        yield from _tensors(item, real)


def _role(module: nn.Module) -> str:
    if isinstance(module, NORMS):
        fixed = isinstance(module, BATCH_NORMS) and not module.training
        return "affine" if fixed and module.running_mean is not None else "norm"
    if isinstance(module, LAYERS):
        return "layer"
    return "mixer" if isinstance(module, MIXERS) else "activation"


def _rms(grad: Tensor) -> float:
    return grad.double().square().mean().sqrt().item()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:#.3g}".removesuffix(".")


def _describe(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
