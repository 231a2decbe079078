"""The HTML pages: whole, linked, and in need of nothing that is not on them."""

import json
import re
import runpy
import shutil
import subprocess
import sys
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
    (title,) = soup("h1")
    assert soup.title.text == title.text != ""
    ids = [tag["id"] for tag in soup.find_all(id=True)]
    assert len(ids) == len(set(ids))
    current = [link["href"] for link in soup.nav("a") if link.has_attr("aria-current")]
    assert current == [page]
    assert set(pages.PAGES.values()) <= {link["href"] for link in soup.nav("a")}
    sections = [heading["id"] for heading in soup.main(["h2", "h3", "h4"])]
    assert [link["href"][1:] for link in soup.nav.select("ul ul a")] == sections
    assert [link["href"][1:] for link in soup.main(class_="anchor")] == sections


def test_next_leads_through_the_series_and_previous_back(soups):
    read = ["index.html"]
    while link := soups[read[-1]].nav.find("a", rel="next"):
        assert soups[link["href"]].nav.find("a", rel="prev")["href"] == read[-1]
        read.append(link["href"])
    assert read == list(pages.SERIES.values())


@each_page
def test_links_stay_on_the_machine_unless_clicked(folder, soups, page):
    soup = soups[page]
    (script,) = soup("script")
    assert script.attrs == {}
    assert not re.search("https?:|import|fetch", script.text)
    assert soup(["iframe", "object", "embed", "audio", "video", "source", "base"]) == []
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
            assert (folder / (unquote(link.path) or page)).is_file(), link
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
        hidden = hidden or {"check", "figure"} & set(cell.metadata.get("tags", []))
        assert (block.find_parent("details") is not None) == bool(hidden)


def test_minutes_count_words_code_in_sight_and_outputs():
    v4, output = pages.nbformat.v4, pages.nbformat.v4.new_output("stream", text="1")
    cells = [v4.new_markdown_cell("word " * 400)]
    cells += [v4.new_code_cell("1\n" * 40, outputs=[output] * 4)]
    cells += [v4.new_code_cell("1\n" * 400, metadata={"tags": ["check"]})]
    assert pages.minutes(v4.new_notebook(cells=cells)) == 2 + 2 + 1


def test_an_error_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"^The pages are not written: .*file: File exists$"):
        pages.main(["--out", str(tmp_path / "file")])
    monkeypatch.setitem(sys.modules, "nbconvert", None)
    with pytest.raises(SystemExit, match=r"^The pages need nbconvert: pip install"):
        runpy.run_path(pages.__file__, run_name="__main__")


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
    assert [a["href"] for a in soup("a")] == ["#on-a-15", "index.html#on-a-15", "requirements.txt"]
    assert soup.img["src"].startswith("data:image/png;base64,iVBOR")
    assert (tmp_path / "requirements.txt").is_file()


# Pages in frames as narrow as a phone (Chromium's own windows are wider): is anything wider than
# its frame, what was asked for, which colours are too near to their ground, what do buttons copy,
# what would be printed?
PROBE = r"""<!DOCTYPE html><title></title>{}<script>
const media = (page, feature) => {
  for (const sheet of page.styleSheets)
    for (const rule of sheet.cssRules)
      if (rule.media?.mediaText.includes(feature)) rule.media.mediaText = "all"
}
const numbers = color => color.match(/[\d.]+/g).map(Number)
const light = color => {
  const [r, g, b] = numbers(color).map(v => ((v / 255 + 0.055) / 1.055) ** 2.4) // near enough
  return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05
}
const faint = page => {
  const texts = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT), found = new Set()
  while (texts.nextNode()) {
    const tag = texts.currentNode.parentElement, {color} = getComputedStyle(tag)
    let under = tag
    const ground = () => getComputedStyle(under).backgroundColor
    while (numbers(ground())[3] === 0 && under.parentElement) under = under.parentElement
    const ratio = light(color) / light(ground())
    const seen = tag.tagName !== "SCRIPT" && texts.currentNode.data.trim()
    if (seen && Math.max(ratio, 1 / ratio) < 4.5)
      found.add(color + " on " + ground())
  }
  return [...found]
}
addEventListener("load", () => {
  document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
    const inner = frame.contentWindow, page = inner.document, root = page.documentElement
    const all = what => [...page.querySelectorAll(what)], said = {}
    const shown = what => all(what).filter(tag => tag.checkVisibility()).length
    said.widths = [inner.innerWidth, root.scrollWidth]
    said.asked = inner.performance.getEntriesByType("resource").map(entry => entry.name)
    said.listed = shown("nav li")
    inner.scrollTo(0, root.scrollHeight)
    said.nav = Math.round(page.querySelector("nav")?.getBoundingClientRect().top)
    said.copied = []
    const clipboard = {writeText: text => said.copied.push(text)}
    Object.defineProperty(inner.navigator, "clipboard", {value: clipboard})
    for (const button of all("button")) button.click()
    said.faint = faint(page)
    media(page, "dark")
    said.ground = getComputedStyle(page.body).backgroundColor
    said.faint.push(...faint(page))
    media(page, "print")
    said.printed = shown("nav, button, .anchor, .folded, .turn")
    said.addresses = all("main a").map(link => getComputedStyle(link, "::after").content)
    return said
  }))
})</script>"""
FRAME = '<iframe width="{}" height="800" srcdoc="{}"></iframe>'


def looked_at(htmls, folder):
    """Return what a browser says of each page, a list of pairs of width and text; the console.

    All in one browser, whose start takes longer than a page.
    """
    probe = folder / "probe.html"
    frames = "".join(FRAME.format(width, escape(html)) for width, html in htmls)
    probe.write_text(PROBE.replace("{}", frames, 1), encoding="utf8")
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
def test_in_a_browser(folder, soups, tmp_path):
    names = list(pages.PAGES.values())
    htmls = [(folder / name).read_text(encoding="utf8") for name in names]
    all_said, console = looked_at([(360, html) for html in htmls] + [(1400, htmls[0])], tmp_path)
    assert console == []
    for name, said in zip([*names, names[0]], all_said, strict=True):
        main = soups[name].main
        width = 1400 if said is all_said[-1] else 360
        blocks = [block.pre.text.rstrip() for block in main(class_="highlight")]
        links = [link["href"] for link in main("a")]
        assert said == {
            "widths": [width, width],
            "asked": [],
            "listed": len(soups[name].nav("li")) if width == 1400 else 0,
            "nav": 0,
            "copied": blocks,
            "faint": [],
            "ground": "rgb(20, 23, 27)",
            "printed": 0,
            "addresses": [f'" ({x})"' if x.startswith("http") else "none" for x in links],
        }, name


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_bad_page_is_noticed_in_the_browser(tmp_path):
    html = (
        "<!DOCTYPE html><body style='background: #fff'><p style='width: 400px; color: #888'>faint"
    )
    html += "<script>no()</script>"
    html += '<img src="https://example.invalid/a.png"><button>copy</button>'
    good = "<!DOCTYPE html><body style='background: #fff'>good"
    (fine, bad), console = looked_at([(360, good), (360, html)], tmp_path)
    assert fine["widths"] == [360, 360]
    assert fine["faint"] == fine["asked"] == []
    assert bad["widths"][1] > bad["widths"][0] == 360
    assert bad["asked"] == ["https://example.invalid/a.png"]
    assert bad["faint"][0].startswith("rgb(136, 136, 136) on ")
    assert bad["printed"] == 1
    assert any("no is not defined" in line for line in console)
