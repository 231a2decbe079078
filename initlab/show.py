"""What the pages show: figures with their alt text, tables, one colour for one init."""

import base64
import io
import os
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import display
from matplotlib.figure import Figure
from PIL import Image

# Throughout the series; "C1" and so on are those of style.mplstyle
COLORS = {"default": "C1", "kaiming_normal": "C0", "kaiming_uniform": "C2"}
COLORS |= {"orthogonal": "C3", "xavier_normal": "C4"}


def set_up() -> None:
    """Set the style of the pages, and one thread for torch unless OMP_NUM_THREADS is set."""
    plt.style.use("initlab.style")
    if "OMP_NUM_THREADS" not in os.environ:  # one suffices; two on shared cores wait for each other
        torch.set_num_threads(1)


def show(figure: Figure, alt: str) -> None:
    """Display `figure` in a notebook with `alt` as the text for who cannot see it, and close it."""
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=2 * figure.dpi, pil_kwargs={"compress_level": 1})
    picture = Image.open(full).convert("RGB")  # two pixels for one on the page, for dense screens
    picture.quantize(256).save(small, format="png", optimize=True)  # a third as large
    width, height = (pixels // 2 for pixels in picture.size)
    data = {"image/png": base64.b64encode(small.getvalue()).decode(), "text/plain": repr(figure)}
    metadata = {"image/png": {"alt": alt, "width": width, "height": height}}
    display(data, raw=True, metadata=metadata)
    plt.close(figure)


def stored(*claims: bool) -> None:
    """Print one line if a claim of the text does not hold with the values chosen; else nothing.

    >>> stored(1 < 2, 2 < 1)
    The text holds for the values stored: with these, some of it does not.
    """
    if not all(claims):
        print("The text holds for the values stored: with these, some of it does not.")


class Table(pd.DataFrame):
    """A DataFrame that shows its floats with four decimals; the values stay as exact as they are.

    Columns with sizes above 10,000, or below 0.001 and none negative, show three digits instead.
    """

    @property
    def _constructor(self) -> type["Table"]:
        return Table

    def _formats(self) -> list[Callable[[float], str] | None]:
        """Return the format of each column; None for what holds no floats."""
        formats = {}
        for name, column in self.select_dtypes("floating").items():
            sizes = column[column != 0].abs()
            small = (sizes < 1e-3).any() and not (column < 0).any()
            formats[name] = "#.3g" if small or (sizes > 1e4).any() else "z.4f"
        formats |= self.attrs.get("formats", {})
        return [f"{{:{formats[name]}}}".format if name in formats else None for name in self]

    def __repr__(self) -> str:
        return self.to_string(formatters=self._formats())

    def _repr_html_(self) -> str:
        return self.to_html(formatters=self._formats(), border=0)


def table(rows: Mapping[str, Any], formats: Mapping[str, str] | None = None) -> Table:
    """Return a table of rows by name: mappings from columns to values, or moments.

    `formats` are format specifications by column, such as ".1%".

    >>> table({"default": {"fan_in": 25, "rms": 0.63882}})
             fan_in    rms
    default      25 0.6388
    """

    def cells(row: Any) -> Mapping[str, Any]:
        if not isinstance(row, tuple):
            return row
        return {name: value for name, value in row._asdict().items() if isinstance(value, float)}

    made = Table.from_dict({name: cells(row) for name, row in rows.items()}, orient="index")
    made.attrs["formats"] = dict(formats or {})
    return made
