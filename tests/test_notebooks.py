"""The notebooks: complete, clean, and as stored on two machines."""

import base64
import copy
import io
import re
from statistics import median

import nbformat
import numpy as np
import pytest
from PIL import Image
from regenerate import METADATA, NOTEBOOKS, ROOT, kernel, pictures, tags

PAGES = {path: nbformat.read(path, as_version=4) for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))}
each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)

# Stored outputs must not depend on the number of threads nor on the vector instructions
MACHINES = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "two threads, AVX2": {
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",  # two workers with two threads each on two cores
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}

# Root mean square difference of all pixel values, of 255. The same code on another processor or
# number of threads moves a line by a small fraction of a pixel, a changed number moves it whole.
FIGURE_TOLERANCE = 1.0


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


def figures(cell):
    """Take the figures out of the outputs of a cell, and return their pixels."""
    pngs = [o.data.pop("image/png") for o in cell.outputs if "image/png" in o.get("data", {})]
    images = (Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB") for png in pngs)
    return [np.asarray(image, dtype=float) for image in images]


def are_alike(figure, other):
    return np.sqrt(np.mean((figure - other) ** 2)) <= FIGURE_TOLERANCE


def test_a_figure_that_moved_is_noticed():
    figure = np.asarray(Image.open(ROOT / "imgs" / "depth.png").convert("RGB"), dtype=float)
    assert are_alike(figure, figure)
    assert not are_alike(figure, np.roll(figure, 2, axis=0))  # by one pixel of the page


@pytest.fixture(scope="module", params=MACHINES)
def execute(request):
    """Pages share a kernel: one each takes 40 % more time."""
    with kernel(**MACHINES[request.param]) as execute:
        yield execute


@each_page
def test_outputs_are_as_stored(path, execute):
    notebook, expected = copy.deepcopy(PAGES[path]), copy.deepcopy(PAGES[path])
    execute(notebook)
    for cell, stored in zip(code(notebook), code(expected), strict=True):
        for figure, other in zip(figures(cell), figures(stored), strict=True):
            assert are_alike(figure, other), cell.source
        assert cell == stored
