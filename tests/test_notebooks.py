"""The notebooks as files: complete and clean. That they hold, nbval sees (machines.py)."""

import base64
import re
from statistics import median

import nbformat
import pytest
from machines import FIGURE_TOLERANCE, figure_difference
from regenerate import METADATA, NOTEBOOKS, ROOT, pictures, tags

PAGES = {path: nbformat.read(path, as_version=4) for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))}
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell.outputs]


def texts(notebook):
    """Return the texts that a page puts out."""
    return [o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs(notebook)]


@each_page
def test_is_small_and_stored_as_jupyterlab_writes_it(path):
    notebook = PAGES[path]
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert not {"error", "stderr"} & {o.get("name", o.output_type) for o in outputs(notebook)}
    pngs = [output.get("data", {}).get("image/png", "") for output in outputs(notebook)]
    assert max(map(len, pngs)) * 3 / 4 < 100_000
    assert path.stat().st_size < 1_000_000
    # But for the version of Python, where it was run
    info = notebook.metadata.language_info | {"version": METADATA["language_info"]["version"]}
    assert notebook.metadata | {"language_info": info} == METADATA


@each_page
def test_cells_are_short_and_what_teaches_nothing_is_folded(path):
    assert sum("parameters" in tags(cell) for cell in code(PAGES[path])) == 1
    in_sight = []
    for cell in code(PAGES[path]):
        assert "raises-exception" not in tags(cell)
        # All outputs but that of the slider are stored
        assert "nbval-skip" not in tags(cell) or "slider" in cell.source.lower()
        folded = not {"check", "figure"}.isdisjoint(tags(cell))
        assert cell.metadata.get("jupyter", {}).get("source_hidden", False) == folded
        # But blank ones, which a formatter puts
        lines = len(re.findall(r"^.*\S", cell.source, re.MULTILINE))
        assert lines <= 15 or "by-hand" in tags(cell), cell.source
        in_sight += [] if folded else [lines]
    assert median(in_sight) <= 5


def test_pictures_are_figures_of_the_notebooks():
    stored = {f"imgs/{path.name}": path.read_bytes() for path in (ROOT / "imgs").iterdir()}
    found = [item for page in PAGES.values() for item in pictures(page).items()]
    assert sorted(found) == sorted(stored.items())


def test_another_figure_is_noticed():
    depth, slopes = ((ROOT / "imgs" / f"{name}.png").read_bytes() for name in ("depth", "slopes"))
    figure, other = (base64.b64encode(png).decode() for png in (depth, slopes))
    assert figure_difference(figure, figure) == 0
    assert figure_difference(figure, other) > FIGURE_TOLERANCE
