"""Plots that more than one notebook draws. The style itself is `style.mplstyle`."""

import base64
import io
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import torch
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

from initlab.tracing import LayerTrace

LABELS = {"signal": "std across inputs", "grad_rms": "rms of the gradient"}


def show(figure: Figure, alt: str) -> None:
    """Display `figure` in a notebook with `alt` as the text for who cannot see it, and close it.

    The PNG has a palette of 256 colours, which makes a notebook a third as large.
    """
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", bbox_inches="tight")
    Image.open(full).convert("RGB").quantize(256).save(small, format="png", optimize=True)
    data = {"image/png": base64.b64encode(small.getvalue()).decode(), "text/plain": repr(figure)}
    display(data, raw=True, metadata={"image/png": {"alt": alt}})
    plt.close(figure)


def plot_trace(
    traces: Mapping[str, Sequence[Sequence[LayerTrace]]],
    fields: Sequence[str] = ("rms", "signal"),
    theory: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> Figure:
    """Draw fields of traces over the layers, on log axes, a panel a field and a colour a name.

    Args:
        traces: By name, the traces of one or several nets of one kind, of equal length. The line
            is their geometric mean, the band their range.
        fields: Attributes of `LayerTrace`.
        theory: By name and field, a value a layer, drawn dashed.

    Returns:
        The figure, not yet shown.

    Example:
        >>> import torch
        >>> from initlab import conv_stack, trace
        >>> figure = plot_trace({"default": [trace(conv_stack(3, 8), torch.randn(4, 1, 9, 9))]})
        >>> [ax.get_ylabel() for ax in figure.axes]
        ['rms', 'std across inputs']
        >>> plt.close(figure)
    """
    figure, axes = plt.subplots(1, len(fields), figsize=(2 + 3.3 * len(fields), 3), squeeze=False)
    for ax, field in zip(axes[0], fields, strict=True):
        for number, (name, nets) in enumerate(traces.items()):
            values = torch.tensor([[getattr(e, field) for e in net] for net in nets]).double()
            layers = range(1, values.shape[1] + 1)
            color = f"C{number}"
            ax.plot(layers, values.log().mean(0).exp(), color=color, label=name)
            ax.fill_between(layers, values.amin(0), values.amax(0), color=color, alpha=0.2, lw=0)
            if theory and field in theory.get(name, {}):
                ax.plot(layers, theory[name][field], color="k", ls="--", lw=0.9)
        ax.set(yscale="log", xlabel="layer", ylabel=LABELS.get(field, field))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if theory:
        handles, labels = [*handles, plt.Line2D([], [], color="k", ls="--")], [*labels, "theory"]
    figure.legend(handles, labels, loc="outside right upper")
    return figure
