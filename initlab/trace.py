"""What a signal looks like after every layer of a model, forward and backward."""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import activation
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

# MultiheadAttention sits among the activations, but takes three tensors and returns a tuple.
TRACED: tuple[type[nn.Module], ...] = (
    _ConvNd,
    nn.Linear,
    *(getattr(activation, name) for name in activation.__all__ if name != "MultiheadAttention"),
)


@dataclass(frozen=True)
class LayerTrace:
    """The numbers of one call of one layer.

    Attributes:
        name: Qualified name in the model, `"act#2"` for the second call of `"act"`; the class
            name when the model is itself the layer.
        kind: Class name of the layer.
        shape: Shape of the output.
        mean: Mean of the output over everything: inputs, channels, positions.
        std: Unbiased standard deviation of the output over everything.
        rms: Root of the mean square of the output.
        signal: Standard deviation *across inputs* (the first dimension): root of the mean, over
            channels and positions, of the unbiased variance; `nan` for a single input.
        grad_rms: Rms of the gradient of the loss with respect to the output; None without a loss
            or when the loss does not depend on the output.
        weight_grad_rms: Rms of the gradient with respect to `weight`, summed over all its uses;
            None without a loss, a weight, or when the weight is frozen or reparametrised.
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


class Trace(list[LayerTrace]):
    """A list of `LayerTrace`, in the order of execution, that prints as a table."""

    def __repr__(self) -> str:
        numbers = ["mean", "std", "rms", "signal"]
        if any(e.grad_rms is not None or e.weight_grad_rms is not None for e in self):
            numbers += ["grad_rms", "weight_grad_rms"]
        rows = [["name", "kind", "shape", *numbers]]
        rows += [
            [e.name, e.kind, str(e.shape), *(_number(getattr(e, field)) for field in numbers)]
            for e in self
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        # 9 characters hold any number (-1.23e-05), so that tables of different models line up.
        widths[3:] = [max(width, 9) for width in widths[3:]]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        )


def trace(
    model: nn.Module,
    x: Tensor,
    target: Any = None,
    loss: Callable[..., Tensor] | None = None,
) -> Trace:
    """Run `model(x)` once and measure the output of every layer, and its gradient.

    Layers are the convolutions, `nn.Linear` and the activation modules, in the order of execution.
    Only calls of modules are seen: `F.relu(h)` leaves no entry. The model runs in the mode it is
    in; it, its `.grad`, buffers and hooks, `x` and torch's random state are left as they were, also
    when an exception passes. Sums are in float64; without a loss no activation is kept.

    Args:
        model: Any module called with one tensor.
        x: Inputs, `(n, ...)`; the first dimension of every output is taken for `n`.
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
        name  kind    shape        mean        std        rms     signal   grad_rms  weight_grad_rms
        0     Linear  (2, 1)       1.00       2.83       2.24       2.83      0.707             1.58
        1     ReLU    (2, 1)       1.50       2.12       2.12       2.12       1.00                -
    """
    if loss is None and target is not None:
        raise ValueError("target given without a loss")
    if x.numel() == 0:
        raise ValueError(f"x is empty, of shape {tuple(x.shape)}")
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise ValueError("the model has layers without a shape (lazy); run it once")
    names = {
        module: name or type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, TRACED)
    }
    calls: Counter[nn.Module] = Counter()
    entries = Trace()
    outputs: list[Tensor] = []
    weights: list[Tensor | None] = []

    def measure(module: nn.Module, _args: Any, y: Tensor) -> Tensor | None:
        calls[module] += 1
        name = names[module] + (f"#{calls[module]}" if calls[module] > 1 else "")
        entries.append(_forward(name, type(module).__name__, y.detach()))
        if loss is None:
            return None
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        weights.append(weight if weight is not None and weight.requires_grad else None)
        # With all parameters before it frozen, the output starts the graph itself.
        outputs.append(y if y.requires_grad else y.detach().requires_grad_())
        # Hand on a copy: an in-place activation would overwrite the tensor whose gradient we want.
        return outputs[-1].clone()

    with (
        torch.random.fork_rng(devices=[x.device] if x.is_cuda else []),
        torch.inference_mode(False),
        torch.set_grad_enabled(loss is not None),
    ):
        with ExitStack() as hooks:
            for module in names:
                hooks.enter_context(module.register_forward_hook(measure))
            # BatchNorm updates copies of its buffers; functional_call puts the originals back.
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            output = torch.func.functional_call(model, buffers, (x.detach().clone(),))
        if not entries:
            raise ValueError("no convolution, linear or activation module ran: nothing to trace")
        if loss is None:
            return entries
        value = loss(output) if target is None else loss(output, target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"the loss must be a scalar tensor, got {_describe(value)}")
        if not value.requires_grad:
            raise ValueError("the loss does not depend on any layer or parameter")
        trained = [weight for weight in weights if weight is not None]
        # Not value.backward(): that would add to the .grad of the parameters.
        grads = torch.autograd.grad(value, [*outputs, *trained], allow_unused=True)

    of_outputs, of_weights = grads[: len(outputs)], iter(grads[len(outputs) :])
    return Trace(
        replace(
            entry,
            grad_rms=_rms(grad),
            weight_grad_rms=None if weight is None else _rms(next(of_weights)),
        )
        for entry, grad, weight in zip(entries, of_outputs, weights, strict=True)
    )


def _forward(name: str, kind: str, y: Tensor) -> LayerTrace:
    shape, v = tuple(y.shape), y.double()
    n, mean = v.numel(), v.mean()
    # Divisions of 0 by 0 give nan quietly, where torch.std and torch.var would warn.
    across = (v - v.mean(0)).square().sum() / ((shape[0] - 1) * (n / shape[0]))
    std = ((v - mean).square().sum() / (n - 1)).sqrt()
    rms = v.square().mean().sqrt()
    return LayerTrace(name, kind, shape, mean.item(), std.item(), rms.item(), across.sqrt().item())


def _rms(grad: Tensor | None) -> float | None:
    return None if grad is None else grad.double().square().mean().sqrt().item()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:#.3g}".removesuffix(".")


def _describe(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
