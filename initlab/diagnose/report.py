"""A trace that prints as a verdict and a table, and that can be drawn."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from initlab.diagnose.rows import ROUNDING, LayerTrace, Problem, number, some
from initlab.diagnose.verdict import judge, remark
from initlab.diagnose.watch import watched

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


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
        return judge(self, self.info)[0]

    def seen(self) -> str:
        """Say which share of the weights (of 2 dimensions or more) was seen to multiply data.

        And which share was judged: not what a problem before it spoils, nor what has no signal.
        """
        if not (sizes := self.info.get("sizes")):
            return "it has no weights" if "sizes" in self.info else ""

        def share(names: set[str], of: set[str], what: str) -> str:
            left = sorted((n for n in sizes if n in of - names), key=lambda n: -sizes[n])
            part = sum(sizes[n] for n in names) / sum(sizes.values())
            return f"{part:.1%} {what}, not {some(left)}" if left else f"100% {what}"

        large = set(sizes)
        seen = large.intersection(n for e in self for w in e.weights for n in w.names)
        judged = large & judge(self, self.info)[1]
        if judged >= seen:
            return share(seen, large, "of the weights seen and judged")
        return f"{share(seen, large, 'of the weights seen')}; {share(judged, seen, 'judged')}"

    def to_frame(self) -> "pd.DataFrame":
        """Return all rows and numbers as a DataFrame, by name of the layer."""
        import pandas as pd

        return pd.DataFrame([vars(e) for e in self]).set_index("name")

    def remarks(self) -> list[str]:
        """Return what is no fault of the init, but good to know."""
        return remark(self, self.info)

    def __repr__(self) -> str:
        return self.text()

    def text(self, fold: bool = True) -> str:
        """Return verdict and table, of which `fold` hides the long runs of sound rows."""
        problems = self.problems()
        numbers = ["mean", "std", "rms", "signal", "grad_rms", "weight_grad_rms", "dead"]
        numbers = [n for n in numbers if any(getattr(e, n) is not None for e in self)]
        table = [["name", "kind", "shape", *numbers]]
        for e in self:
            if abs(e.mean) < ROUNDING * e.rms:  # another processor would print another number
                e = dataclasses.replace(e, mean=0.0)
            table.append([e.name, e.kind, str(e.shape)] + [number(getattr(e, n)) for n in numbers])
        # 9 characters hold any number (-1.23e-05), so that tables of different models line up.
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        forms = [f"{{:{w}}}" if k < 3 else f"{{:>{max(w, 9)}}}" for k, w in enumerate(widths)]
        header, *lines = ("  ".join(forms).format(*cells) for cells in table)
        # Shown are both ends and the rows next to a problem; long runs of others are folded.
        named = {p.layer for p in problems}
        shown = {i + k for i, e in enumerate(self) if e.name in named for k in (-1, 0, 1)}
        shown |= {*range(5), *range(len(self) - 5, len(self))}
        folded = [header]
        for keep, group in groupby(range(len(self)), shown.__contains__):
            run = list(group)
            if keep or len(run) < 3 or not fold:
                folded += [lines[i] for i in run]
            else:
                sizes = number(min(self[i].rms for i in run)), number(max(self[i].rms for i in run))
                folded.append(f"... {len(run)} rows, rms {sizes[0]} to {sizes[1]}")
        count = f"{len(problems) or 'no'} problem{'s' * (len(problems) != 1)} found"
        first = "; ".join(filter(None, (count, self.seen())))
        said = [r for r in self.remarks() if not any(r == p.advice for p in problems)]
        return "\n".join([first, *map(str, problems), *said, "", *folded])


def plot_trace(
    traces: Trace | Mapping[str, Trace | Sequence[Sequence[LayerTrace]]],
    fields: Sequence[str] | None = None,
    theory: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    colors: Mapping[str, str] | None = None,
) -> "Figure":
    """Draw fields of traces over the layers, on log axes, a panel a field and a colour a name.

    Args:
        traces: One trace, or by name, each drawn as its table, over the number of the row from 0:
            with its problems, and thinner from name to name, so that equal ones show. Or by name
            those of several nets of one kind: then the line is their geometric mean, the band
            their range, and layers count from 1.
        fields: Attributes of `LayerTrace`; by default signal, rms and, if there is one, grad_rms.
        theory: By name and field, a value a layer, drawn dashed.
        colors: By name; by default those of the style, in their order.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 2))
        >>> figure = plot_trace(trace(model, torch.randn(8, 9)))
        >>> [ax.get_ylabel() for ax in figure.axes]
        ['signal', 'rms']
        >>> plt.close(figure)
    """
    import matplotlib.pyplot as plt

    named = {"": traces} if isinstance(traces, Trace) else traces
    groups = {n: [nets] if isinstance(nets, Trace) else nets for n, nets in named.items()}
    if fields is None:
        graded = any(e.grad_rms is not None for nets in groups.values() for e in nets[0])
        fields = ("signal", "rms", "grad_rms") if graded else ("signal", "rms")
    tables = all(isinstance(nets, Trace) for nets in named.values())
    first, label = (0, "row of the table") if tables else (1, "layer")
    wide = len(fields) > 2  # then the legend stands below
    size = (9, 3.2) if wide else (2 + 3.3 * len(fields), 3)
    figure, axes = plt.subplots(1, len(fields), figsize=size, squeeze=False, layout="constrained")
    for ax, field in zip(axes[0], fields, strict=True):
        for place, (name, nets) in enumerate(groups.items()):
            rows = [[getattr(e, field) or math.nan for e in net] for net in nets]
            values = torch.tensor(rows, dtype=torch.float64)
            layers = range(first, values.shape[1] + first)
            color, wider = (colors or {}).get(name, f"C{place}"), len(groups) - 1 - place
            width = plt.rcParams["lines.linewidth"] + (1.2 * wider if tables else 0)
            ax.plot(layers, values.log().mean(0).exp(), color=color, lw=width, label=name)
            ax.fill_between(layers, values.amin(0), values.amax(0), color=color, alpha=0.2, lw=0)
            if field in (theory or {}).get(name, {}):
                ax.plot(layers, theory[name][field], color="k", ls="--", lw=0.9)
            for problem in nets[0].problems() if isinstance(named[name], Trace) else []:
                at = first + [e.name for e in nets[0]].index(problem.layer)
                ax.axvline(at, color=color, ls=":", label=f"{problem.layer}: {problem.kind}")
        long = not tables and field == "grad_rms"
        ax.set(yscale="log", xlabel=label, ylabel="rms of the gradient" if long else field)
    handles, names = axes[0, 0].get_legend_handles_labels()
    if theory:
        handles, names = [*handles, plt.Line2D([], [], color="k", ls="--")], [*names, "theory"]
    if names:
        where, columns = ("lower center", 6) if wide else ("right upper", 1)
        figure.legend(handles, names, loc=f"outside {where}", ncols=columns)
    return figure


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
        model: Any module; a compiled or DataParallel one stands for what it wraps (compiled parts
            inside it need torch 2.6).
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
        no problems found; 100% of the weights seen and judged
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
