"""What is left to move: the plot of traces."""

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from initlab.show import COLORS, show, table  # noqa: F401 (for pages not yet changed)
from initlab.tracing import LayerTrace, Trace

LABELS = {"signal": "std across inputs", "grad_rms": "rms of the gradient"}


def plot_trace(
    traces: Trace | Mapping[str, Trace | Sequence[Sequence[LayerTrace]]],
    fields: Sequence[str] | None = None,
    theory: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    colors: Mapping[str, str] | None = None,
) -> Figure:
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
        >>> import torch
        >>> from initlab import conv_stack, trace
        >>> figure = plot_trace(trace(conv_stack(3, 8), torch.randn(4, 1, 9, 9)))
        >>> [ax.get_ylabel() for ax in figure.axes]
        ['signal', 'rms']
        >>> plt.close(figure)
    """
    named = {"": traces} if isinstance(traces, Trace) else traces
    groups = {n: [nets] if isinstance(nets, Trace) else nets for n, nets in named.items()}
    if fields is None:
        graded = any(e.grad_rms is not None for nets in groups.values() for e in nets[0])
        fields = ("signal", "rms", "grad_rms") if graded else ("signal", "rms")
    tables = all(isinstance(nets, Trace) for nets in named.values())
    first, label, labels = (0, "row of the table", {}) if tables else (1, "layer", LABELS)
    wide = len(fields) > 2  # then the legend stands below
    size = (9, 3.2) if wide else (2 + 3.3 * len(fields), 3)
    figure, axes = plt.subplots(1, len(fields), figsize=size, squeeze=False, layout="constrained")
    for ax, field in zip(axes[0], fields, strict=True):
        for number, (name, nets) in enumerate(groups.items()):
            rows = [[getattr(e, field) or math.nan for e in net] for net in nets]
            values = torch.tensor(rows, dtype=torch.float64)
            layers = range(first, values.shape[1] + first)
            color = (colors or {}).get(name, f"C{number}")
            wider = 1.2 * (len(groups) - 1 - number) if tables else 0
            width = plt.rcParams["lines.linewidth"] + wider
            ax.plot(layers, values.log().mean(0).exp(), color=color, lw=width, label=name)
            ax.fill_between(layers, values.amin(0), values.amax(0), color=color, alpha=0.2, lw=0)
            if theory and field in theory.get(name, {}):
                ax.plot(layers, theory[name][field], color="k", ls="--", lw=0.9)
            for problem in nets[0].problems() if isinstance(named[name], Trace) else []:
                at = first + [e.name for e in nets[0]].index(problem.layer)
                ax.axvline(at, color=color, ls=":", label=f"{problem.layer}: {problem.kind}")
        ax.set(yscale="log", xlabel=label, ylabel=labels.get(field, field))
    handles, names = axes[0, 0].get_legend_handles_labels()
    if theory:
        handles, names = [*handles, plt.Line2D([], [], color="k", ls="--")], [*names, "theory"]
    if names:
        place, columns = ("lower center", 6) if wide else ("right upper", 1)
        figure.legend(handles, names, loc=f"outside {place}", ncols=columns)
    return figure
