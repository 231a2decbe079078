"""The notebooks as documents: complete, clean, and true for other values than the stored ones."""

import ast
import base64
import contextlib
import io
import math
import re
from pathlib import Path
from statistics import median
from urllib.parse import unquote

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from machines import FIGURE_TOLERANCE, figure_difference
from regenerate import METADATA, pictures, tags

from initlab import conv_stack, load_mnist, trace
from initlab.__main__ import main as initlab

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
NOTEBOOKS = {p: nbformat.read(p, as_version=4) for p in (ROOT / "notebooks").glob("[0-9]*.ipynb")}
each_page = pytest.mark.parametrize("path", sorted(NOTEBOOKS), ids=lambda path: path.stem)

# What a reader might put into the cell of parameters: each parameter of a notebook once smaller
# and once larger than stored, in as few runs as that takes. Where two of them multiply the time,
# one is small while the other is large. The longest runs come first.
OTHER_VALUES = """
12 seed=1; n_draws=12; depth=4; steps=9; forget=2.5
12 seed=77; n_draws=4; depth=18; steps=33; forget=-3.0
11 seed=1; n_nets=3; depth=31; factor=0.001
11 seed=77; n_nets=12; depth=4; factor=100.0
10 margin=0.001; confidence=0.8; factor=0.1
10 margin=0.05; confidence=0.99; factor=100.0
09 margin=0.001; confidence=0.8; line=1e-5
09 margin=0.05; confidence=0.99; line=0.1
08 seed=1; start=0.1; depth=5; width=300; n_nets=3
08 seed=77; start=4.0; depth=33; width=100; n_nets=24
07 seed=1; side=64; n_nets=11; n_draws=3
07 seed=77; side=256; n_nets=2; n_draws=50
06 seed=1; slope=0.3; depth=1; n_nets=41; n_draws=3
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

# Added to the cell of the sliders, which are set in code: picture and numbers follow
SET_SLIDERS = """
before = picture.value, readout.value
init_slider.value, act_slider.value = 1.0, 0.5
assert picture.value != before[0] and readout.value != before[1]
assert readout.value == str(with_init(1.0).at(0.5))
"""


def code(path):
    return [cell for cell in NOTEBOOKS[path].cells if cell.cell_type == "code"]


def outputs(path):
    return [output for cell in code(path) for output in cell.outputs]


def prose(path):
    if path not in NOTEBOOKS:
        return path.read_text(encoding="utf8")
    return "\n".join(c.source for c in NOTEBOOKS[path].cells if c.cell_type == "markdown")


def folded(cell):
    return not {"check", "stored", "figure"}.isdisjoint(tags(cell))


def numbers(text):
    """Return the decimal numbers of a text, without their signs, as they are written."""
    text = re.sub(r"\]\(.*?\)|arXiv [\d.]+|Python [\d.]+", "", text)  # links and versions
    return re.findall(r"(?<![\w.])\d+\.\d+(?:e[-+]?\d+)?", text)


def is_rounded_from(number, found):
    last_place = 10.0 ** -len(number.partition(".")[2])
    return any(abs(float(number) - x) <= 0.501 * last_place for x in found)


@each_page
def test_stored_as_executed_top_to_bottom_and_as_jupyterlab_writes_it(path):
    notebook = NOTEBOOKS[path]
    nbformat.validate(notebook)
    assert [c.execution_count for c in code(path)] == list(range(1, len(code(path)) + 1))
    for output in outputs(path):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        if "image/png" in output.get("data", {}):
            assert output.metadata["image/png"]["alt"]
            assert len(output.data["image/png"]) * 3 / 4 < 100_000
    assert path.stat().st_size < 1_000_000
    version = {"version": notebook.metadata.language_info.version}  # of Python, where it was run
    expected = METADATA | {"language_info": METADATA["language_info"] | version}
    assert notebook.metadata == expected


@each_page
def test_has_the_parts_of_the_series(path):
    assert sum("parameters" in tags(cell) for cell in code(path)) == 1
    first, *_, last = (c.source for c in NOTEBOOKS[path].cells if c.cell_type == "markdown")
    assert first.startswith(f"# {int(path.name[:2])}. ")
    assert all(f"## {part}\n" in last for part in ("Summary", "Exercises", "References"))
    # Compared strictly, but for the source of torch and a slider
    for cell in code(path):
        assert "nbval-ignore-output" not in tags(cell) or "inspect.getsource(" in cell.source
        assert "nbval-skip" not in tags(cell) or "slider" in cell.source.lower()
        # With other values a reader's "run all cells" does not end there
        assert ("stored" in tags(cell)) == ("raises-exception" in tags(cell))


@each_page
def test_cells_are_short_and_what_teaches_nothing_is_folded(path):
    for cell in code(path):
        assert folded(cell) == cell.metadata.get("jupyter", {}).get("source_hidden", False)
    # Lines that are not blank, as a formatter puts blank ones
    lines = [(len(re.findall(r"^.*\S", c.source, re.MULTILINE)), c) for c in code(path)]
    assert median(n for n, cell in lines if not folded(cell)) <= 5
    assert [c.source for n, c in lines if n > 15 and "by-hand" not in tags(c)] == []


@each_page
def test_sections_are_linked_as_jupyter_names_them(path):
    # Whether files and sections are there at all is seen on the HTML pages
    for name, section in re.findall(r"\]\((\w*(?:\.ipynb)?)#([^)\s]+)\)", prose(path)):
        headings = re.findall(r"^#+ (.*)$", prose(path.with_name(name or path.name)), re.MULTILINE)
        assert unquote(section) in {re.sub(r"[`*$]", "", h).replace(" ", "-") for h in headings}


def test_table_for_the_practitioner_links_sections():
    (text,) = (t for path in NOTEBOOKS for t in prose(path).split("## For the practitioner")[1:])
    rows = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("|")][2:]
    assert rows
    assert [row for row in rows if not re.search(r"\]\(\S*#", row)] == []


def test_pictures_are_figures_of_the_notebooks():
    stored = {path.name: path.read_bytes() for path in (ROOT / "imgs").iterdir()}
    found = [item for notebook in NOTEBOOKS.values() for item in pictures(notebook).items()]
    assert sorted(found) == sorted(stored.items())


def test_another_figure_is_noticed():
    depth, slopes = ((ROOT / "imgs" / f"{name}.png").read_bytes() for name in ("depth", "slopes"))
    figure, other = (base64.b64encode(png).decode() for png in (depth, slopes))
    assert figure_difference(figure, figure) == 0
    assert figure_difference(figure, other) > FIGURE_TOLERANCE


def put_out(path):
    """Return the texts that a page puts out."""
    return [o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs(path)]


@pytest.mark.parametrize("path", [*sorted(NOTEBOOKS), README], ids=lambda path: path.stem)
def test_numbers_of_the_text_are_shown_on_the_page_or_for_the_readme_on_one_of_them(path):
    pages = [path] if path in NOTEBOOKS else NOTEBOOKS
    shown = [t for page in pages for t in (*(cell.source for cell in code(page)), *put_out(page))]
    found = [float(number) for t in shown for number in numbers(t)]
    text = re.sub(r"```.*?```", "", prose(path), flags=re.DOTALL)
    # One decimal says little: some number of the page is always near
    claims = [number for number in numbers(text) if re.search(r"\.\d\d", number)]
    assert claims
    assert [number for number in claims if not is_rounded_from(number, found)] == []


def test_recipe_of_the_readme_gives_a_net_without_problems():
    recipe, _ = re.findall(r"```python\n(.*?)```", prose(README), re.DOTALL)
    x = load_mnist().x_valid[:8]
    for depth in (4, 30):
        net = conv_stack(depth, 32, downsample=2, classes=10)
        assert trace(net, x).problems() or depth == 4
        exec(recipe, {"net": net, "nn": torch.nn})
        assert trace(net, x).problems() == []
        assert not any(layer.bias.any() for layer in net if hasattr(layer, "bias"))


def test_example_of_the_readme_gives_the_numbers_of_its_comments():
    _, example = re.findall(r"```python\n(.*?)```", prose(README), re.DOTALL)
    names, checked = {}, 0
    for line in example.splitlines():
        statement, _, comment = line.partition("  # ")
        found = [float(number) for number in numbers(run(statement, names))]
        for number in numbers(comment):
            if "near" in comment:  # what is random
                assert any(abs(float(number) - x) < 0.1 * abs(x) for x in found), line
            else:
                assert is_rounded_from(number, found), line
            checked += 1
    assert checked >= 6


def test_output_of_the_command_in_the_readme_is_what_it_prints(capsys):
    command, *_ = re.findall(r"```sh\ninitlab (trace .*?)\n```", prose(README))
    (output,) = re.findall(r"```text\n(.*?)```", prose(README), re.DOTALL)
    assert initlab(command.split()) == 1
    assert capsys.readouterr().out.startswith(output.removesuffix("    ...\n"))


def run(cell, names):
    """Run a cell and return what it puts out, as text: also of the expression at its end."""
    body = ast.parse(cell).body
    last = [body.pop()] if body and isinstance(body[-1], ast.Expr) else []
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(ast.Module(body, []), "cell", "exec"), names)
            exec(compile(ast.Interactive(last), "cell", "single"), names)
    except Exception as error:
        error.add_note(cell)
        raise
    return out.getvalue().strip()


def parameters(source):
    names = {"math": math}
    exec(source, names)
    return {name: value for name, value in names.items() if name not in ("math", "__builtins__")}


@each_page
def test_other_values_are_smaller_and_larger_than_each_stored_one(path):
    (cell,) = (cell for cell in code(path) if "parameters" in tags(cell))
    stored = parameters(cell.source)
    others = [parameters(case[3:]) for case in OTHER_VALUES if path.name.startswith(case[:2])]
    assert set().union(*others) == set(stored)
    for name, value in stored.items():
        found = [other[name] for other in others if name in other]
        assert value not in found, name
        if isinstance(value, int | float):
            assert value == 0 or min(found) < value, name
            assert value < max(found), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # as a kernel does
@pytest.mark.parametrize("case", OTHER_VALUES)
def test_holds_for_other_values(case, monkeypatch):
    (path,) = (path for path in NOTEBOOKS if path.name.startswith(case[:2]))
    monkeypatch.chdir(path.parent)
    # In this process, as a kernel's imports would take as long again as the run
    names, texts = {"__name__": "__main__"}, []
    with plt.rc_context(), torch.random.fork_rng():
        for cell in code(path):
            if "stored" not in tags(cell):  # whose claims are about the stored values
                source = cell.source + f"\n{case[3:]}" * ("parameters" in tags(cell))
                sliders = "nbval-skip" in tags(cell)
                texts.append(run(source + SET_SLIDERS * sliders, names) * (not sliders))
                # Figures are drawn, but their pictures, a fifth of the time, nobody compares
                names["show"] = lambda figure, alt: plt.close(figure)
    names.clear()  # which functions of the page hold, and so its tensors
    # With the stored values all of it is
    assert any(text not in "".join(put_out(path)) for text in texts)
