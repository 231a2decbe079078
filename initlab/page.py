"""What the pages show: figures with their alt text, tables, one colour for one init."""

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

from initlab.tracing import LayerTrace, Trace

# Throughout the series; "C1" and so on are those of style.mplstyle
COLORS = {
    "default": "C1",
    "kaiming_normal": "C0",
    "kaiming_uniform": "C2",
    "orthogonal": "C3",
    "xavier_normal": "C4",
}
LABELS = {"signal": "std across inputs", "grad_rms": "rms of the gradient"}


def show(figure: Figure, alt: str) -> None:
    """Display `figure` in a notebook with `alt` as the text for who cannot see it, and close it.

    The PNG has two pixels for each that it takes on the page, for dense screens, and a palette of
    256 colours, which makes it a third as large.
    """
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=2 * figure.dpi, pil_kwargs={"compress_level": 1})
    picture = Image.open(full).convert("RGB")
    picture.quantize(256).save(small, format="png", optimize=True)
    width, height = (pixels // 2 for pixels in picture.size)
    data = {"image/png": base64.b64encode(small.getvalue()).decode(), "text/plain": repr(figure)}
    metadata = {"image/png": {"alt": alt, "width": width, "height": height}}
    display(data, raw=True, metadata=metadata)
    plt.close(figure)


class Table(pd.DataFrame):
    """A DataFrame that shows its floats with four decimals; the values stay as exact as they are.

    A column without negative numbers that has some below 0.001, or any column with sizes above
    10,000, shows three significant digits instead. `attrs["formats"]` overrides both by column.
    """

    @property
    def _constructor(self) -> type["Table"]:
        return Table

    def __repr__(self) -> str:
        return self.to_string(formatters=_formats(self))

    def _repr_html_(self) -> str:
        return self.to_html(formatters=_formats(self), border=0)


def table(
    rows: Mapping[str, Any] | Iterable[Mapping[str, Any]], formats: Mapping[str, str] | None = None
) -> Table:
    """Return a table of rows: by name, or a list, whose first column then names them.

    A row is a mapping from columns to values, or `Stats` or `Moments`, whose floats it takes.
    `formats` are format specifications by column, such as ".1%".

    Example:
        >>> rows = {"default": {"fan_in": 25, "rms": 0.63882}, "Kaiming": {"fan_in": 9, "rms": 1.5}}
        >>> table(rows)
                 fan_in    rms
        default      25 0.6388
        Kaiming       9 1.5000
    """
    if isinstance(rows, Mapping):
        made = Table.from_dict({name: _row(row) for name, row in rows.items()}, orient="index")
    else:
        made = Table([_row(row) for row in rows])
        made = made.set_index(made.columns[0]).rename_axis(None)
    made.attrs["formats"] = dict(formats or {})
    return made


def _row(row: Any) -> Mapping[str, Any]:
    if isinstance(row, tuple):
        return {k: v for k, v in row._asdict().items() if isinstance(v, float)}
    return row


def _formats(frame: pd.DataFrame) -> list[Callable[[float], str] | None]:
    """Return the format of each column; None for what holds no floats."""
    chosen = frame.attrs.get("formats", {})

    def of(name: str, column: pd.Series) -> Callable[[float], str] | None:
        if name in chosen:
            return ("{:" + chosen[name] + "}").format
        if not pd.api.types.is_float_dtype(column):
            return None
        sizes = column[column != 0].abs()
        small = (sizes < 1e-3).any() and not (column < 0).any()
        return "{:#.3g}".format if small or (sizes > 1e4).any() else "{:z.4f}".format

    return [of(name, column) for name, column in frame.items()]


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
