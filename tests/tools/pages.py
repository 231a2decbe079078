"""Write the README and the stored notebooks as HTML pages that need no network.

    python tests/tools/pages.py [--out html]

Nothing is executed. Formulas become MathML, pictures are part of their page, links to notebooks
lead to their pages. Code cells that only check or draw are folded. Beside a page's title stand its
minutes: 200 words a minute, 3 seconds a line of code in sight, 15 seconds an output.
"""

import argparse
import base64
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

try:
    import nbformat
    from bs4 import BeautifulSoup
    from latex2mathml.converter import convert
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
    from pygments.formatters import HtmlFormatter
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"The pages need {error.name}: pip install -r requirements.txt")

ROOT = Path(__file__).resolve().parents[2]
FOLDED = {"check", "figure"}  # tags; a cell with a hidden source is folded too
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
SERIES = {ROOT / "README.md": "index.html"} | {path: f"{path.stem}.html" for path in NOTEBOOKS}
RECORDS = {
    ROOT / "data" / "README.md": "data.html",
    **{ROOT / "data" / n / "README.md": f"{n}.html" for n in ("training", "predict", "survey")},
}
PAGES = SERIES | RECORDS

TEMPLATE = """{% extends "base/display_priority.j2" %}
{% block header %}<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ resources.title | e }}</title><link rel="icon" href="data:,">
<style>{{ resources.css }}</style></head>
<body><nav aria-label="Pages"><a class="skip" href="#text">Skip to the text</a>
<details><summary>Pages and contents</summary><ul>
{% for page, title, minutes in resources.links -%}
<li><a href="{{ page }}"{% if page == resources.page %} aria-current="page"{% endif %}>
{{- title | e }} <small>{{ minutes }} min</small></a></li>
{% endfor -%}
</ul></details><p>
{% for rel, name, (page, title, minutes) in resources.turn -%}
<a rel="{{ rel }}" href="{{ page }}" title="{{ title | e }}">{{ name }}</a>
{% endfor -%}
</p></nav><main id="text">{% endblock %}
{% block footer %}</main><script>{{ resources.js }}</script></body></html>{% endblock %}
{% block markdowncell %}{{ cell.source | markdown2html }}{% endblock %}
{% block input %}
{%- if cell | is_folded %}<details class="folded"><summary>show the
{%- if "figure" in cell.metadata.tags %} code{% else %} check{% endif %}</summary>{% endif %}
{{- cell.source | highlight_code(metadata=cell.metadata) }}
{%- if cell | is_folded %}</details>{% endif %}{% endblock %}
{% block output %}<div class="output">{{ super() }}</div>{% endblock %}
{% block execute_result %}{{ self.display_data() }}{% endblock %}
{% block stream %}<pre>{{ output.text | ansi2html }}</pre>{% endblock %}
{% block data_text %}<pre>{{ output.data["text/plain"] | ansi2html }}</pre>{% endblock %}
{% block data_html %}{{ output.data["text/html"] }}{% endblock %}
{% block data_png %}{% set shown = output.metadata["image/png"] or {} %}
<img src="data:image/png;base64,{{ output.data["image/png"] | replace("\n", "") }}"
{%- if cell | is_map %} class="map"{% endif %}
{%- for key in ("alt", "width", "height") if key in shown %} {{ key }}="{{ shown[key] | e }}"
{%- endfor %}>{% endblock %}"""


def mathml(latex: str, display: str = "inline") -> str:
    """Return a formula as MathML."""
    tilde = "<mi>&#x0007E;</mi>"  # what the converter makes of \sim, which is a relation
    return convert(latex, display=display).replace(tilde, "<mo>∼</mo>")


class Renderer(IPythonRenderer):
    """Markdown with formulas that the browser itself draws."""

    def inline_math(self, body: str) -> str:
        return mathml(body)

    def block_math(self, body: str) -> str:
        return f'<span class="wide">{mathml(body, "block")}</span>'


def markdown(source: str) -> str:
    renderer = Renderer(escape=False, exclude_anchor_links=True)
    return MarkdownWithMath(renderer=renderer).render(source)


def is_folded(cell: nbformat.NotebookNode) -> bool:
    hidden = cell.metadata.get("jupyter", {}).get("source_hidden", False)
    return hidden or not FOLDED.isdisjoint(cell.metadata.get("tags", []))


def is_map(cell: nbformat.NotebookNode) -> bool:
    """Return whether a cell draws a map, whose bright and dark are not to be swapped at night."""
    return "imshow" in cell.source or "pcolormesh" in cell.source


def minutes(notebook: nbformat.NotebookNode) -> int:
    """Return about how long a page takes to read."""
    words = sum(len(c.source.split()) for c in notebook.cells if c.cell_type == "markdown")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    lines = sum(len(cell.source.splitlines()) for cell in code if not is_folded(cell))
    outputs = sum(len(cell.outputs) for cell in code)
    return max(1, round(words / 200 + lines * 3 / 60 + outputs * 15 / 60))


def slug(heading: str) -> str:
    """Return the anchor of a heading: GitHub's, to which Jupyter's is mapped too."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


def css() -> str:
    """Return our style, with the colours of code in light and in dark mode."""
    light, dark = (
        HtmlFormatter(style=style, nobackground=True).get_style_defs(".highlight")
        for style in ("xcode", "github-dark")
    )
    dark = f"@media screen and (prefers-color-scheme: dark) {{ {dark} }}"
    return f"{light}\n{dark}\n{Path(__file__).with_suffix('.css').read_text(encoding='utf8')}"


def outline(soup: BeautifulSoup) -> None:
    """Name the sections, give them anchors, and list them below their page in the navigation."""
    contents = soup.new_tag("ul")
    for heading in soup.find_all(re.compile("^h[1-6]$")):
        heading["id"] = slug(heading.get_text())
        if heading.name == "h1":
            continue
        item, link = soup.new_tag("li"), soup.new_tag("a", href=f"#{heading['id']}")
        link.string = heading.get_text()
        item.append(link)
        contents.append(item)
        label = {"class": "anchor", "aria-label": "Link to this section"}
        heading.append(soup.new_tag("a", href=link["href"], attrs=label))
    for paragraph in soup("p"):  # the notebook's own links to its neighbours: not for paper
        if paragraph.get_text().startswith(("Previous: ", "Next: ")):
            paragraph["class"] = "turn"
    here = soup.find("a", attrs={"aria-current": "page"})
    if here and contents.contents:
        here.insert_after(contents)


def localize(html: str, source: Path, out: Path) -> str:
    """Point the links of `source` to pages and put its pictures in."""
    soup = BeautifulSoup(html, "html.parser")
    for block in soup.select("main > pre"):  # code of no language
        block.wrap(soup.new_tag("div", attrs={"class": "highlight"}))
    for table in soup("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "wide"}))
    for picture in soup("img"):  # figures are legible at half their size; below it they scroll
        picture["style"] = f"min-width: {int(picture.get('width', 800)) // 2}px"
        picture.wrap(soup.new_tag("span", attrs={"class": "wide"}))
    for tag in soup.find_all(["a", "img"]):
        key = "src" if tag.name == "img" else "href"
        url = urlsplit(tag.get(key, ""))
        path = (source.parent / unquote(url.path)).resolve() if url.path else source
        if url.scheme or (tag.name == "a" and tag.find_parent("nav")):
            continue
        if tag.name == "img":
            data = base64.b64encode(path.read_bytes()).decode()
            tag[key] = f"data:image/{path.suffix[1:].replace('svg', 'svg+xml')};base64,{data}"
            continue
        if path not in PAGES:  # another file of the repository
            (out / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, out / path.relative_to(ROOT))
        page = PAGES.get(path, path.relative_to(ROOT).as_posix())
        tag[key] = page + (f"#{slug(unquote(url.fragment))}" if url.fragment else "")
    outline(soup)
    return str(soup)


def read(path: Path) -> nbformat.NotebookNode:
    """Read a notebook, or a text as a notebook of one cell."""
    if path.suffix == ".ipynb":
        return nbformat.read(path, as_version=4)
    cell = nbformat.v4.new_markdown_cell(path.read_text(encoding="utf8"))
    return nbformat.v4.new_notebook(cells=[cell])


def write(out: Path) -> list[Path]:
    """Write all pages into the folder `out` and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    exporter = HTMLExporter(
        template_name="basic",
        raw_template=TEMPLATE,
        filters={"markdown2html": markdown, "is_folded": is_folded, "is_map": is_map},
    )
    notebooks = {path: read(path) for path in PAGES}
    titles = {path: nb.cells[0].source.partition("\n")[0] for path, nb in notebooks.items()}
    titles = {path: title.lstrip("# ").replace("`", "") for path, title in titles.items()}
    links = {path: (PAGES[path], titles[path], minutes(nb)) for path, nb in notebooks.items()}
    series, js = list(SERIES), Path(__file__).with_suffix(".js").read_text(encoding="utf8")
    neighbours = {path: [] for path in PAGES}
    for path, following in pairwise(series):
        neighbours[path].append(("next", "Next →", links[following]))
        neighbours[following].insert(0, ("prev", "← Previous", links[path]))
    for path, notebook in notebooks.items():
        resources = {"page": PAGES[path], "title": titles[path], "links": list(links.values())}
        resources |= {"turn": neighbours[path], "css": css(), "js": js}
        html, _ = exporter.from_notebook_node(notebook, resources)
        (out / PAGES[path]).write_text(localize(html, path, out), encoding="utf8")
    return [out / page for page in PAGES.values()]


def main(argv: list[str] | None = None) -> None:
    """Write the pages into the folder that is asked for, or say in one sentence why not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "html", help="the folder to write into")
    try:
        print(*write(parser.parse_args(argv).out), sep="\n")
    except OSError as error:
        sys.exit(f"The pages are not written: {error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
