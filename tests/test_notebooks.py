"""The notebooks as documents: complete, clean, and true for other values than the stored ones."""

import ast
import base64
import re
from pathlib import Path
from statistics import median
from urllib.parse import unquote

import nbformat
import pytest
import regenerate
from figures import FIGURE_TOLERANCE, figure_difference
from forks import run_cells
from regenerate import tags

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
FOLDED = {"check", "stored", "figure"}

# What a reader might put into the cell of parameters: each parameter of a notebook once smaller
# and once larger than stored, in as few runs as that takes. Where two of them multiply the time,
# one is small while the other is large. Values are source texts.
OTHER_VALUES = [
    ("01", {"seed": "1", "slopes": "(0.3, 0.7, 1.5, 4)", "n_draws": "3"}),
    ("01", {"seed": "77", "slopes": "(0.3,)", "n_draws": "320"}),
    ("02", {"seed": "1", "slopes": "(0.3, 0.7, 1.5, 4)", "n_draws": "3"}),
    ("02", {"seed": "77", "slopes": "(0.3,)", "n_draws": "320"}),
    ("03", {"seed": "1", "slopes": "(0.3, 0.7, 1.5, 4)", "n_draws": "3", "n_runs": "2"}),
    ("03", {"seed": "77", "slopes": "(0.3,)", "n_draws": "320", "n_runs": "30"}),
    (
        "04",
        {
            "seed": "1",
            "slope": "0.3",
            "init_slopes": "(0.3, 0.7, 1.5, 4)",
            "act_slopes": "(0.3, 1.5)",
            "n_draws": "3",
        },
    ),
    (
        "04",
        {
            "seed": "77",
            "slope": "1.5",
            "init_slopes": "(0.7,)",
            "act_slopes": "(0.0, 0.25, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)",
            "n_draws": "220",
        },
    ),
    ("05", {"seed": "1", "slope": "0.3", "max_slope": "0.5", "n_draws": "3"}),
    ("05", {"seed": "77", "slope": "1.5", "max_slope": "3.0", "n_draws": "1010"}),
    (
        "06",
        {
            "seed": "1",
            "slope": "0.3",
            "pairs": "((0.7, 0.7),)",
            "depth": "1",
            "n_draws": "3",
            "n_nets": "5",
        },
    ),
    (
        "06",
        {
            "seed": "77",
            "slope": "1.5",
            "pairs": "((1.5, 0.3), (0.0, 0.0), (0.3, 0.0), (1.5, 0.0), (0.0, 0.3))",
            "depth": "35",
            "n_draws": "210",
            "n_nets": "1",
        },
    ),
    ("07", {"margin": "0.001", "confidence": "0.8", "live_steps": "4"}),
    ("07", {"margin": "0.05", "confidence": "0.99", "live_steps": "9"}),
    (
        "08",
        {
            "seed": "1",
            "n_draws": "4",
            "factor": "0.001",
            "blocks": "(5, 17)",
            "depth": "31",
            "width": "64",
            "start": "0.1",
        },
    ),
    (
        "08",
        {
            "seed": "77",
            "n_draws": "7",
            "factor": "100.0",
            "blocks": "(2, 3)",
            "depth": "5",
            "width": "180",
            "start": "4.0",
        },
    ),
]


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def own(name):
    (path,) = (path for path in NOTEBOOKS if path.name.startswith(name))
    return path


def folded(cell):
    return not FOLDED.isdisjoint(tags(cell))


def headings(path):
    """Return the anchors of the headings: a notebook's as Jupyter's, a text's as GitHub's."""
    if path.suffix != ".ipynb":
        titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown"]
    titles = re.findall(r"^#+ (.*)$", "\n".join(cell.source for cell in cells), re.MULTILINE)
    return {re.sub(r"[`*$]", "", title).replace(" ", "-") for title in titles}


def links(text):
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_as_executed_top_to_bottom(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_has_the_parts_of_the_series(path):
    notebook = nbformat.read(path, as_version=4)
    assert sum("parameters" in tags(cell) for cell in notebook.cells) == 1
    text = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert text[0].startswith(f"# {int(path.name[:2])}. ")
    assert all(f"## {part}\n" in text[-1] for part in ("Summary", "Exercises", "References"))
    # Compared strictly, but for the source of torch and a slider
    for cell in code(notebook):
        if "nbval-ignore-output" in tags(cell):
            assert "inspect.getsource(" in cell.source
        if "nbval-skip" in tags(cell):
            assert "slider" in cell.source.lower()
        # With other values a reader's "run all cells" does not end there
        assert ("stored" in tags(cell)) == ("raises-exception" in tags(cell))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short_and_what_teaches_nothing_is_folded(path):
    cells = code(nbformat.read(path, as_version=4))
    for cell in cells:
        assert folded(cell) == cell.metadata.get("jupyter", {}).get("source_hidden", False)
    # Lines that are not blank, as a formatter puts blank ones
    lines = [(len(re.findall(r"^.*\S", c.source, re.MULTILINE)), c) for c in cells]
    assert median(n for n, cell in lines if not folded(cell)) <= 5
    long = [cell.source for n, cell in lines if n > 15 and "by-hand" not in tags(cell)]
    assert long == []


@pytest.mark.parametrize("path", [*NOTEBOOKS, ROOT / "README.md"], ids=lambda path: path.stem)
def test_links_lead_to_files_and_their_sections(path):
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for link in links(text):
        name, _, section = link.partition("#")
        if "://" not in link:
            target = path.parent / unquote(name) if name else path
            assert target.exists(), link
            assert not section or unquote(section) in headings(target), link


def test_table_for_the_practitioner_links_sections():
    tables = []
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            if "## For the practitioner" in cell.source:
                tables.append((path, cell.source.partition("## For the practitioner")[2]))
    ((path, text),) = tables
    rows = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("|")][2:]
    assert rows
    assert [row for row in rows if not any("#" in link for link in links(row))] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_figures_are_small_and_described(path):
    for cell in code(nbformat.read(path, as_version=4)):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                assert output.metadata["image/png"]["alt"]
                assert len(output.data["image/png"]) * 3 / 4 < 100_000


def test_pictures_are_figures_of_the_notebooks():
    pictures = {}
    for path in NOTEBOOKS:
        pictures |= regenerate.pictures(nbformat.read(path, as_version=4))
    stored = {path.name: path.read_bytes() for path in (ROOT / "imgs").iterdir()}
    assert stored == pictures


def test_another_figure_is_noticed():
    figure = base64.b64encode((ROOT / "imgs" / "what_is_a.png").read_bytes()).decode()
    other = base64.b64encode((ROOT / "imgs" / "slopes.png").read_bytes()).decode()
    assert figure_difference(figure, figure) == 0
    assert figure_difference(figure, other) > FIGURE_TOLERANCE


def numbers(text):
    """Return the decimal numbers of a text, without their signs, as they are written."""
    text = re.sub(r"\]\(.*?\)|arXiv [\d.]+|Python [\d.]+", "", text)  # links and versions
    return re.findall(r"(?<![\w.])\d+\.\d+(?:e[-+]?\d+)?", text)


def shown(notebook):
    """Return the numbers that code cells hold or put out."""
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    texts = [output.get("text", "") for output in outputs]
    for kind in ("text/plain", "text/html"):
        texts += [output.get("data", {}).get(kind, "") for output in outputs]
    texts += [cell.source for cell in code(notebook)]
    return [float(number) for text in texts for number in numbers(text)]


def is_rounded_from(number, found):
    last_place = 10.0 ** -len(number.partition(".")[2])
    return any(abs(float(number) - x) <= 0.501 * last_place for x in found)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_numbers_of_the_text_are_shown_on_the_page(path):
    notebook = nbformat.read(path, as_version=4)
    found = shown(notebook)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    # One decimal says little: some number of the page is always near
    claims = [number for number in numbers(text) if re.search(r"\.\d\d", number)]
    assert claims
    missing = [number for number in claims if not is_rounded_from(number, found)]
    assert missing == []


def test_numbers_of_the_readme_are_shown_in_the_notebooks():
    found = [x for path in NOTEBOOKS for x in shown(nbformat.read(path, as_version=4))]
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    claims = [number for number in numbers(text) if re.search(r"\.\d\d", number)]
    assert claims
    missing = [number for number in claims if not is_rounded_from(number, found)]
    assert missing == []


def test_example_of_the_readme_gives_the_numbers_of_its_comments():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names, checked = {}, 0
    for line in example.splitlines():
        statement, _, comment = line.partition("  # ")
        if not (statement and isinstance(ast.parse(statement).body[0], ast.Expr)):
            exec(statement, names)
            continue
        found = [float(number) for number in numbers(str(eval(statement, names)))]
        for number in numbers(comment):
            if "near" in comment:  # what is random
                assert any(abs(float(number) - x) < 0.1 * abs(x) for x in found), line
            else:
                assert is_rounded_from(number, found), line
            checked += 1
    assert checked >= 6


# Added to the cell of the sliders, which are set in code: picture and numbers follow
SET_SLIDERS = """
before = picture.value, readout.value
init_slider.value, act_slider.value = 1.0, 0.5
assert picture.value != before[0] and readout.value != before[1]
assert readout.value == str(with_init(1.0).at(0.5))
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_other_values_are_smaller_and_larger_than_each_stored_one(path):
    name = path.name[:2]
    (cell,) = (c for c in code(nbformat.read(path, as_version=4)) if "parameters" in tags(c))
    others = [values for other, values in OTHER_VALUES if other == name]
    for parameter, stored in regenerate.parameters(cell.source).items():
        texts = {values[parameter] for values in others if parameter in values}
        assert texts, parameter
        assert ast.unparse(stored) not in texts, parameter
        if isinstance(stored, ast.Constant) and isinstance(stored.value, int | float):
            numbers = [ast.literal_eval(text) for text in texts]
            assert stored.value == 0 or min(numbers) < stored.value, parameter
            assert stored.value < max(numbers), parameter


def test_changed_sets_parameters_by_name_and_leaves_out_what_is_stored(tmp_path):
    new = nbformat.v4
    source = "a = 1  # ä: one\nb, c = 2, (\n    3,\n)  # two\nd = 'ö'; e = 5"
    cells = [
        new.new_code_cell(source, metadata={"tags": ["parameters"]}),
        new.new_code_cell("a = 1", metadata={"tags": ["stored"]}),
        new.new_code_cell("a = 1"),
    ]
    path = tmp_path / "notebook.ipynb"
    nbformat.write(new.new_notebook(cells=cells), path)
    notebook = regenerate.changed(path, {"a": "10", "c": "(4, 5)", "b": "'é'", "e": "6"})
    expected = "a = 10  # ä: one\nb, c = 'é', (4, 5)  # two\nd = 'ö'; e = 6"
    assert [cell.source for cell in notebook.cells] == [expected, "a = 1"]
    with pytest.raises(ValueError, match="no parameter f, but a, b, c, d, e"):
        regenerate.changed(path, {"f": "1"})


@pytest.mark.parametrize(("name", "values"), OTHER_VALUES[::-1])  # the longest runs first
def test_holds_for_other_values(name, values):
    cells = code(regenerate.changed(own(name), values))
    sources = [c.source + SET_SLIDERS * ("nbval-skip" in tags(c)) for c in cells]
    put_out = run_cells(sources, ROOT / "notebooks")
    outputs = [
        output for cell in code(nbformat.read(own(name), as_version=4)) for output in cell.outputs
    ]
    stored = "".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs)
    # With the stored values all of it is
    assert any(text not in stored for text in put_out)
