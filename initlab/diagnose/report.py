"""A trace that prints as a verdict and a table, and that can be drawn."""

import dataclasses
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from initlab.diagnose.rows import ROUNDING, LayerTrace, Problem, number
from initlab.diagnose.verdict import diagnose
from initlab.diagnose.watch import watched

if TYPE_CHECKING:
    import pandas as pd

LABELS = {"signal": "std across inputs", "grad_rms": "rms of the gradient"}


class Trace(list[LayerTrace]):
    """A list of `LayerTrace`, in the order of execution, that prints as a verdict and a table."""

    info: Mapping[str, Any] = {}

    def problems(self) -> list[Problem]:
        """Return what is wrong, first cause first; see `initlab.diagnose.verdict` for the limits.

        Example:
            >>> import torch
            >>> model = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 2))
            >>> _ = nn.init.constant_(model[0].bias, -10)
            >>> [(p.layer, p.kind, p.value) for p in trace(model, torch.randn(8, 9)).problems()]
            [('0', 'dead', 1.0)]
        """
        return diagnose(self, self.info)

    @property
    def seen(self) -> str:
        """Say which share of the weights (of 2 dimensions or more) was seen to multiply data."""
        sizes = self.info.get("sizes", {})
        if not sizes:
            return ""
        names = {n for e in self for w in e.weights for n in w.names}
        unseen = sorted((n for n in sizes if n not in names), key=lambda n: -sizes[n])
        share = 1 - sum(sizes[n] for n in unseen) / sum(sizes.values())
        text = (
            f"{share:.0%} of the weights seen" if not unseen else f"{share:.1%} of the weights seen"
        )
        if unseen:
            more = f" and {len(unseen) - 2} more" if len(unseen) > 2 else ""
            text += f", not {', '.join(unseen[:2])}{more}"
        return text

    def to_frame(self) -> "pd.DataFrame":
        """Return all rows and numbers as a DataFrame, by name of the layer."""
        import pandas as pd

        return pd.DataFrame([vars(e) for e in self]).set_index("name")

    def __repr__(self) -> str:
        problems = self.problems()
        numbers = ["mean", "std", "rms", "signal", "grad_rms", "weight_grad_rms", "dead"]
        numbers = [n for n in numbers if any(getattr(e, n) is not None for e in self)]
        table = [["name", "kind", "shape", *numbers]]
        for e in self:
            if abs(e.mean) < ROUNDING * e.rms:  # another processor would print another number
                e = dataclasses.replace(e, mean=0.0)
            table.append([e.name, e.kind, str(e.shape)] + [number(getattr(e, n)) for n in numbers])
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
                folded.append(
                    f"... {len(run)} rows, rms {number(min(sizes))} to {number(max(sizes))}"
                )
        count = f"{len(problems) or 'no'} problem{'s' * (len(problems) != 1)} found"
        first = "; ".join(filter(None, (count, self.seen)))
        return "\n".join([first, *map(str, problems), "", *folded])


def trace(
    model: nn.Module,
    x: Any,
    target: Any = None,
    loss: Callable[..., Tensor] | None = None,
) -> Trace:
    """Run `model(x)` once and measure the output of every layer, and its gradient.

    Layers are all operations that multiply data by a weight of 2 or more dimensions, whatever
    module or function holds them, normalisations and activations, in the order of execution. The
    model runs in the mode it is in; it, its `.grad`, buffers and hooks, `x` and torch's random
    state are left as they were, also when an exception passes. Sums are in float64; without a loss
    no activation is kept.

    Args:
        model: Any module; a compiled or DataParallel one stands for what it wraps.
        x: Inputs `(n, ...)`: a tensor, a tuple of arguments or a dict of keyword arguments. The
            first dimension of every output is taken for `n`, or for a multiple of it.
        target: What the loss compares the output with.
        loss: `loss(output, target)`, or `loss(output)` when `target` is None, returning a scalar.

    Raises:
        ValueError: If `x` is empty, if the model has parameters without a shape (lazy), without
            numbers (meta) or a ScriptModule, if no such layer ran, if the loss is not a scalar or
            does not depend on any layer or parameter, or if there is a target without a loss.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU(inplace=True))
        >>> _ = nn.init.ones_(model[0].weight)
        >>> trace(model, torch.tensor([[1.0, 2.0], [-4.0, 3.0]]))
        no problems found; 100% of the weights seen
        <BLANKLINE>
        name  kind    shape        mean        std        rms     signal       dead
        0     Linear  (2, 1)       1.00       2.83       2.24       2.83          -
        1     ReLU    (2, 1)       1.50       2.12       2.12       2.12       0.00
    """
    if loss is None and target is not None:
        raise ValueError("target given without a loss")
    rows, info = watched(model, x, target, loss)
    made = Trace(rows)
    made.info = info
    return made
