"""The notebooks: complete, clean, as stored on two machines, and sound with other values."""

import base64
import copy
import io
import math
import re
from statistics import median

import nbformat
import numpy as np
import pytest
from PIL import Image
from regenerate import METADATA, NOTEBOOKS, ROOT, kernel, pictures, tags

PAGES = {path: nbformat.read(path, as_version=4) for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))}
PROSE = {
    path: "\n".join(cell.source for cell in page.cells if cell.cell_type == "markdown")
    for path, page in PAGES.items()
}
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

# What a reader might put into the cell of parameters: each parameter of a notebook once smaller
# and once larger than stored, in as few runs as that takes. Where two of them multiply the time,
# one is small while the other is large.
OTHER_VALUES = """
12 seed=1; n_draws=12; depth=4; steps=9; forget=2.5
12 seed=77; n_draws=4; depth=18; steps=33; forget=-3.0
11 seed=1; n_nets=2; depth=31; factor=0.001
11 seed=77; n_nets=11; depth=4; factor=100.0
10 margin=0.001; confidence=0.8; factor=0.1
10 margin=0.05; confidence=0.99; factor=100.0
09 margin=0.001; confidence=0.8; line=1e-5
09 margin=0.05; confidence=0.99; line=0.1
08 seed=1; start=0.1; depth=5; width=300; n_nets=3
08 seed=77; start=4.0; depth=33; width=100; n_nets=24
07 seed=1; side=64; n_nets=11; n_draws=3
07 seed=77; side=256; n_nets=2; n_draws=50
06 seed=1; slope=0.3; depth=1; n_nets=26; n_draws=3
06 seed=77; slope=1.5; depth=35; n_nets=1; n_draws=110
05 seed=1; n_draws=3
05 seed=77; n_draws=1010
04 seed=1; slope=0.3; n_draws=3
04 seed=77; slope=1.5; n_draws=220
03 seed=1; slopes=(0.3, 0.7, 1.5, 4); n_draws=3; n_shown=2
03 seed=77; slopes=(0.3,); n_draws=320; n_shown=30
02 seed=1; slopes=(0.3, 0.7, 1.5, 4); n_draws=3
02 seed=77; slopes=(0.3,); n_draws=320
01 seed=1; n_draws=3
01 seed=77; n_draws=320
""".strip().splitlines()

# Figures are drawn, but their pictures, a fifth of the time, nobody compares
SKETCH = "from matplotlib.pyplot import close; show = lambda figure, alt: close(figure)"
# Added to the cell of the sliders, which are set in code: picture and numbers follow
SET_SLIDERS = """
before = picture.value, readout.value
init_slider.value, act_slider.value = 1.0, 0.5
assert picture.value != before[0] and readout.value != before[1]
assert readout.value == str(with_init(1.0).at(0.5))
"""


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
def test_has_the_parts_of_the_series(path):
    assert PROSE[path].startswith(f"# {int(path.name[:2])}. ")
    sections = re.findall("^## (.*)$", PROSE[path], re.MULTILINE)
    assert sections[-3:] == ["Summary", "Exercises", "References"]
    assert sum("parameters" in tags(cell) for cell in code(PAGES[path])) == 1
    for cell in code(PAGES[path]):  # all outputs but that of the slider are stored
        assert "nbval-skip" not in tags(cell) or "slider" in cell.source.lower()


@each_page
def test_cells_are_short_and_what_teaches_nothing_is_folded(path):
    in_sight = []
    for cell in code(PAGES[path]):
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


def parameters(source):
    names = {}
    exec(source, {"math": math}, names)
    return names


@each_page
def test_other_values_are_smaller_and_larger_than_each_stored_one(path):
    (cell,) = (cell for cell in code(PAGES[path]) if "parameters" in tags(cell))
    cases = (case[3:] for case in OTHER_VALUES if case[:2] == path.name[:2])
    stored, *others = map(parameters, (cell.source, *cases))
    for name, value in stored.items():
        small, large = sorted(other.pop(name) for other in others)
        assert value not in (small, large), name
        assert isinstance(value, tuple) or value == 0 or small < value, name
        assert isinstance(value, tuple) or value < large, name
    assert others == [{}, {}]


@pytest.mark.parametrize("execute", ["one thread"], indirect=True)
@pytest.mark.parametrize("case", OTHER_VALUES)
def test_holds_for_other_values(case, execute):
    (stored,) = (page for path, page in PAGES.items() if path.name.startswith(case[:2]))
    notebook = copy.deepcopy(stored)
    for cell in code(notebook):
        cell.source += f"\n{case[3:]}\n{SKETCH}" * ("parameters" in tags(cell))
        cell.source += SET_SLIDERS * ("nbval-skip" in tags(cell))
    execute(notebook)
    assert not set(texts(notebook)) <= set(texts(stored))
