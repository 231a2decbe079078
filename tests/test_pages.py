"""The HTML pages: whole, linked, and in need of nothing that is not on them."""

import json
import re
import shutil
import subprocess
from html import escape
from urllib.parse import unquote, urlsplit

import nbformat
import pages
import pytest
from bs4 import BeautifulSoup

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("html")
    assert {path.name for path in pages.write(folder)} == set(pages.PAGES.values())
    return folder


@pytest.fixture(scope="module")
def soups(folder):
    texts = {name: (folder / name).read_text(encoding="utf8") for name in pages.PAGES.values()}
    return {name: BeautifulSoup(text, "html.parser") for name, text in texts.items()}


each_page = pytest.mark.parametrize("page", pages.PAGES.values())
each_notebook = pytest.mark.parametrize("path", pages.NOTEBOOKS, ids=lambda path: path.stem)


@each_page
def test_is_a_whole_document(soups, page):
    soup = soups[page]
    assert soup.html["lang"] == "en"
    assert soup.find("meta", attrs={"name": "viewport"})
    assert soup.title.text == soup.h1.text != ""
    ids = [tag["id"] for tag in soup.find_all(id=True)]
    assert len(ids) == len(set(ids))
    current = [link["href"] for link in soup.nav("a") if link.has_attr("aria-current")]
    texts = ("data.html", "training.html", "predict.html", "survey.html")  # which nothing leads to
    assert current == [page] * (page not in texts)


@each_page
def test_links_stay_on_the_machine_unless_clicked(folder, soups, page):
    soup = soups[page]
    assert soup(["script", "iframe", "object", "embed", "audio", "video", "source", "base"]) == []
    for style in soup("style"):
        assert not re.search(r"url\(|@import|//", style.text)
    for tag in soup.find_all(True):
        assert {"srcset", "data", "poster", "background", "action"}.isdisjoint(tag.attrs)
        assert "url(" not in tag.get("style", "")
        assert tag.get("src", "data:").startswith("data:")
        link = urlsplit(tag.get("href", "data:"))
        if link.scheme:
            assert link.scheme in (("http", "https") if tag.name == "a" else ("data",)), link
        else:
            assert tag.name == "a"
            assert not link.netloc
            assert not link.path.endswith((".ipynb", "README.md")), link
            assert (folder / unquote(link.path)).is_file(), link
            target = soups[link.path] if link.path else soup
            assert not link.fragment or target.find(id=unquote(link.fragment)), link


@each_notebook
def test_links_of_the_notebook_are_on_its_page(soups, path):
    found = {link["href"] for link in soups[pages.PAGES[path]].main("a")}
    text = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
    for name, section in re.findall(r"\]\((\w+)\.ipynb(#[^)]+)?\)", text):
        assert f"{name}.html" + (f"#{pages.slug(unquote(section[1:]))}" if section else "") in found


@each_page
def test_no_latex_is_left(soups, page):
    texts = soups[page].main.find_all(string=True)
    seen = [t for t in texts if t.find_parent(["pre", "code", "annotation"]) is None]
    assert not re.search(r"\$|\\[A-Za-z]|\\[^\w\s]", "".join(seen))


@each_notebook
def test_has_all_cells_outputs_and_described_figures(soups, path):
    soup = soups[pages.PAGES[path]]
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    figures = [o.metadata["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert [image["alt"] for image in soup("img")] == [figure["alt"] for figure in figures]
    assert all(image["alt"] for image in soup("img"))
    blocks = soup.find_all("div", class_=re.compile("^hl-"))
    code = [block.text.strip("\n") for block in blocks]
    assert code == [cell.source.strip("\n") for cell in cells]
    assert len(soup.find_all("div", class_="output")) == len(outputs)
    for cell, block in zip(cells, blocks, strict=True):
        hidden = cell.metadata.get("jupyter", {}).get("source_hidden", False)
        hidden = hidden or {"check", "stored", "figure"} & set(cell.metadata.get("tags", []))
        assert (block.find_parent("details") is not None) == bool(hidden)


def test_formulas_links_and_pictures_of_a_text(tmp_path):
    html = pages.markdown("## On *a*: 1.5?\n\n$x \\sim \\frac{a}{2}$ [b](x.md#On-a:-1.5?)\n\n$$y$$")
    assert html.count("<math") == 2
    assert "<mo>∼</mo><mfrac>" in html
    assert "\\" not in html
    source = pages.ROOT / "notebooks" / "99.ipynb"
    html += '<img src="../imgs/depth.png" alt=""> [](#) <a href="../requirements.txt">c</a>'
    html = html.replace("x.md", "../README.md")
    soup = BeautifulSoup(pages.localize(html, source, tmp_path), "html.parser")
    assert soup.h2["id"] == "on-a-15"
    assert [a["href"] for a in soup("a")] == ["index.html#on-a-15", "requirements.txt"]
    assert soup.img["src"].startswith("data:image/png;base64,iVBOR")
    assert (tmp_path / "requirements.txt").is_file()


# Pages in frames as narrow as a phone (Chromium's own windows are wider): is anything wider than
# its frame, and what was asked for?
PROBE = """<!DOCTYPE html><title></title>{}<script>
addEventListener("load", () => {{
  document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {{
    const inner = frame.contentWindow
    const asked = inner.performance.getEntriesByType("resource").map(entry => entry.name)
    return [inner.innerWidth, inner.document.documentElement.scrollWidth, asked]
  }}))
}})</script>"""
FRAME = '<iframe width="360" height="800" srcdoc="{}"></iframe>'


def looked_at(htmls, folder):
    """Return what a browser says of each page: its window's width, its own, requests; the console.

    All in one browser, whose start takes longer than a page.
    """
    probe = folder / "probe.html"
    frames = "".join(FRAME.format(escape(html)) for html in htmls)
    probe.write_text(PROBE.format(frames), encoding="utf8")
    options = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"]
    options += ["disable-background-networking", "disable-component-update", "disable-sync"]
    options += ["hide-scrollbars"]
    options += [f"user-data-dir={folder / 'profile'}", "enable-logging=stderr", "dump-dom"]
    options += ["host-resolver-rules=MAP * ~NOTFOUND"]
    command = [CHROMIUM, *(f"--{option}" for option in options), probe.as_uri()]
    done = subprocess.run(command, capture_output=True, encoding="utf8", timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(BeautifulSoup(done.stdout, "html.parser").title.text), console


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser(folder, tmp_path):
    names = list(pages.PAGES.values())
    htmls = [(folder / name).read_text(encoding="utf8") for name in names]
    said, console = looked_at(htmls, tmp_path)
    assert dict(zip(names, said, strict=True)) == {name: [360, 360, []] for name in names}
    assert console == []


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_bad_page_is_noticed_in_the_browser(tmp_path):
    html = "<!DOCTYPE html><p style='width: 400px'><script>no()</script>"
    html += '<img src="https://example.invalid/a.png">'
    good = "<!DOCTYPE html><title>good</title>"
    (fine, (width, needed, asked)), console = looked_at([good, html], tmp_path)
    assert fine == [360, 360, []]
    assert needed > width == 360
    assert asked == ["https://example.invalid/a.png"]
    assert any("no is not defined" in line for line in console)
