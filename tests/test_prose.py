"""The text of the pages and the README: numbers, links and code are what they say."""

import re
from urllib.parse import unquote

import torch
from test_notebooks import PAGES, ROOT, code, each_page, texts

from initlab import conv_stack, load_mnist, trace
from initlab.__main__ import main as initlab

PROSE = {
    path: "\n".join(cell.source for cell in page.cells if cell.cell_type == "markdown")
    for path, page in PAGES.items()
}
README = (ROOT / "README.md").read_text(encoding="utf8")
RECIPE, EXAMPLE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def numbers(text):
    """Return the decimal numbers of a text, without their signs, as they are written."""
    text = re.sub(r"\]\(.*?\)|arXiv [\d.]+|Python [\d.]+", "", text)  # links and versions
    return re.findall(r"(?<![\w.])\d+\.\d+(?:e[-+]?\d+)?", text)


def is_rounded_from(number, found):
    last_place = 10.0 ** -len(number.partition(".")[2])
    return any(abs(float(number) - x) <= 0.501 * last_place for x in found)


def not_shown(text, pages):
    """Return the numbers of a text that none of the pages shows.

    Of two decimals at least: with one, some number of a page is always near.
    """
    shown = [t for page in pages for t in (*(cell.source for cell in code(page)), *texts(page))]
    found = [float(number) for t in shown for number in numbers(t)]
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    claims = [number for number in numbers(text) if re.search(r"\.\d\d", number)]
    assert claims
    return [number for number in claims if not is_rounded_from(number, found)]


@each_page
def test_has_the_parts_of_the_series(path):
    assert PROSE[path].startswith(f"# {int(path.name[:2])}. ")
    sections = re.findall("^## (.*)$", PROSE[path], re.MULTILINE)
    assert sections[-3:] == ["Summary", "Exercises", "References"]


@each_page
def test_sections_are_linked_as_jupyter_names_them(path):
    # Whether files and sections are there at all is seen on the HTML pages
    for name, section in re.findall(r"\]\((\w*(?:\.ipynb)?)#([^)\s]+)\)", PROSE[path]):
        headings = re.findall(r"^#+ (.*)$", PROSE[path.with_name(name or path.name)], re.MULTILINE)
        assert unquote(section) in {re.sub(r"[`*$]", "", h).replace(" ", "-") for h in headings}


@each_page
def test_numbers_of_the_text_are_shown_on_the_page(path):
    assert not_shown(PROSE[path], [PAGES[path]]) == []


def test_numbers_of_the_readme_are_shown_on_a_page():
    assert not_shown(README, PAGES.values()) == []


def test_recipe_of_the_readme_gives_a_net_without_problems():
    x = load_mnist().x_valid[:8]
    for depth in (4, 30):
        net = conv_stack(depth, 32, downsample=2, classes=10)
        assert trace(net, x).problems() or depth == 4
        exec(RECIPE, {"net": net, "nn": torch.nn})
        assert trace(net, x).problems() == []
        assert not any(layer.bias.any() for layer in net if hasattr(layer, "bias"))


def test_example_of_the_readme_gives_the_numbers_of_its_comments():
    names, checked = {}, 0
    for line in EXAMPLE.splitlines():
        statement, _, comment = line.partition("  # ")
        if not comment:
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


def test_command_in_the_readme_prints_the_output_shown(capsys):
    command, *_ = re.findall(r"```sh\ninitlab (trace .*?)\n```", README)
    (output,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    assert initlab(command.split()) == 1
    assert capsys.readouterr().out.startswith(output.removesuffix("    ...\n"))
