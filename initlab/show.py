"""What the pages show: figures with their alt text, tables, one colour for one init."""

import base64
import io
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

# Throughout the series; "C1" and so on are those of style.mplstyle
COLORS = {
    "default": "C1",
    "kaiming_normal": "C0",
    "kaiming_uniform": "C2",
    "orthogonal": "C3",
    "xavier_normal": "C4",
}


def set_up() -> None:
    """Set the style of the pages, and one thread for torch unless OMP_NUM_THREADS is set.

    One is enough for what they compute; two on shared cores wait for each other.
    """
    plt.style.use("initlab.style")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


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


def stored(*claims: bool) -> None:
    """Print one line if a claim of the text does not hold with the values chosen; else nothing.

    With the values stored all hold, so that the line is a change of the page's outputs.

    Example:
        >>> stored(1 < 2, 2 < 1)
        The text here belongs to the values stored: with these, some of it does not hold.
    """
    if not all(claims):
        print("The text here belongs to the values stored: with these, some of it does not hold.")


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
        made = Table.from_dict({name: _cells(row) for name, row in rows.items()}, orient="index")
    else:
        made = Table([_cells(row) for row in rows])
        made = made.set_index(made.columns[0]).rename_axis(None)
    made.attrs["formats"] = dict(formats or {})
    return made


def _cells(row: Any) -> Mapping[str, Any]:
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
