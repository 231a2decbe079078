"""The notebooks with other values than the stored ones: whatever a reader tries, they go on."""

import copy
import math

import pytest
from regenerate import kernel, tags
from test_notebooks import PAGES, code, each_page, texts

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
03 seed=1; slopes=(0.3, 0.7, 1.5, 4); n_draws=3
03 seed=77; slopes=(0.3,); n_draws=320
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


@pytest.fixture(scope="module")
def execute():
    with kernel() as execute:
        yield execute


@pytest.mark.parametrize("case", OTHER_VALUES)
def test_holds_for_other_values(case, execute):
    (stored,) = (page for path, page in PAGES.items() if path.name.startswith(case[:2]))
    notebook = copy.deepcopy(stored)
    for cell in code(notebook):
        cell.source += f"\n{case[3:]}\n{SKETCH}" * ("parameters" in tags(cell))
        cell.source += SET_SLIDERS * ("nbval-skip" in tags(cell))
    execute(notebook)
    assert not set(texts(notebook)) <= set(texts(stored))
