"""The web site, built once from the repository as it is, and read as a browser reads it."""

import ast
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

import tripletlib

BeautifulSoup = pytest.importorskip(
    "bs4", reason="the site needs beautifulsoup4: pip install --group docs (pip 25.1 or newer)"
).BeautifulSoup

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Links for readers and for search engines; a browser follows none of them by itself.
ONLY_LINKS = {"author", "canonical", "copyright", "index", "next", "prev", "search"}
LOADED = re.compile(r"""(?:url\(|@import)\s*["']?([^"')\s]+)""")

chapters = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.stem)


@pytest.fixture(scope="session")
def pages(site):
    """Give every page by its address."""
    return {
        file.relative_to(site).as_posix(): BeautifulSoup(file.read_bytes(), "html.parser")
        for file in site.rglob("*.html")
        if "_static" not in file.parts
    }


@pytest.fixture
def page(pages, chapter):
    return pages[f"notebooks/{chapter.stem}.html"]


def cells(chapter, kind):
    return [c for c in nbformat.read(chapter, as_version=4).cells if c.cell_type == kind]


def is_folded(tag):
    folds = tag.find_parents("details")
    return any(not fold.has_attr("open") for fold in folds)


def test_the_front_page_is_the_readme_and_lists_every_page(pages):
    assert pages["index.html"] == pages["README.html"]
    listed = {link["href"] for link in pages["index.html"].select(".bd-sidebar-primary a[href]")}
    expected = {f"notebooks/{chapter.stem}.html" for chapter in CHAPTERS}
    expected |= {"notebooks/glossary.html", "docs/api/index.html", "docs/measured.html"}
    assert expected <= listed
    assert "n = 8\N{NO-BREAK SPACE}192" in pages["docs/measured.html"].find("table").text
    assert "n = 8\N{NO-BREAK SPACE}192" not in pages["index.html"].text


@chapters
def test_a_solution_is_folded(chapter, page):
    folded = [c for c in cells(chapter, "code") if c.metadata.get("jupyter")]
    blocks = {block.text.strip(): block for block in page.select("div.cell_input pre")}
    assert len(folded) >= 3
    for cell in folded:
        assert is_folded(blocks[cell.source.strip()]), cell.source
    solutions = [text for text in blocks if text.startswith("# Solution")]
    assert len(solutions) == sum(c.source.startswith("# Solution") for c in folded)


@chapters
def test_an_answer_is_folded(chapter, page):
    written = "\n".join(cell.source for cell in cells(chapter, "markdown"))
    summaries = [tag for tag in page.find_all("summary") if tag.text.startswith("Answer")]
    assert len(summaries) == written.count("<summary>Answer") >= 8
    for summary in summaries:
        fold = summary.parent
        assert fold.name == "details"
        assert not fold.has_attr("open")
        assert len(fold.text) > len(summary.text) + 40


@chapters
def test_figures_are_those_committed_each_with_its_alternative_text(chapter, page):
    committed = [
        cell.metadata["alt"]
        for cell in cells(chapter, "code")
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert [image.get("alt") for image in page.select("div.cell_output img")] == committed


def test_every_image_has_an_alternative_text(pages):
    for address, page in pages.items():
        for image in page.find_all("img"):
            assert len(image.get("alt", "")) >= 20, (address, image)


@chapters
def test_formulas_are_drawn_by_the_browser_alone(chapter, page):
    written = "\n".join(cell.source for cell in cells(chapter, "markdown"))
    assert len(page.select('math[display="block"]')) == written.count("$$") / 2
    assert not any("\\" in formula.text for formula in page.find_all("math"))


def loaded(page):
    """Give what a browser fetches by itself to show a page."""
    for link in page.find_all("link", href=True):
        if not set(link.get("rel", [])) <= ONLY_LINKS:
            yield link["href"]
    for tag in page.find_all(src=True):
        yield tag["src"]
    for tag in page.find_all(["object", "image", "use"]):
        yield from filter(None, map(tag.get, ("data", "href", "xlink:href")))
    for tag in page.find_all(srcset=True):
        yield from (part.split()[0] for part in tag["srcset"].split(","))
    for tag in page.find_all(style=True):
        yield from LOADED.findall(tag["style"])
    for style in page.find_all("style"):
        yield from LOADED.findall(style.text)


def test_nothing_is_requested_from_elsewhere(site, pages):
    for address, page in pages.items():
        outside = [url for url in loaded(page) if re.match(r"(?!data:)\w+:|//", url)]
        assert not outside, (address, outside)
        for script in page.find_all("script", src=False):
            assert "//" not in re.sub(r"//[^\n]*\n", "", script.text), (address, script)
    for sheet in site.rglob("*.css"):
        for url in LOADED.findall(sheet.read_text(encoding="utf-8")):
            assert not re.match(r"(?!data:)\w+:|//", url), (sheet.name, url)


def test_internal_links_lead_somewhere(site, pages):
    anchors = {
        address: {tag["id"] for tag in page.find_all(id=True)} for address, page in pages.items()
    }
    for address, page in pages.items():
        links = [tag["href"] for tag in page.find_all(["a", "link"], href=True)]
        links += [tag["src"] for tag in page.find_all(src=True)]
        for link in links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = address
            if parts.path:
                file = (site / address).parent / unquote(parts.path)
                assert file.is_file(), (address, link)
                target = file.resolve().relative_to(site.resolve()).as_posix()
            if parts.fragment and target in anchors:
                assert unquote(parts.fragment) in anchors[target], (address, link)


def test_every_public_name_is_in_the_api_once(pages):
    api = [page for address, page in pages.items() if address.startswith("docs/api/")]
    for name in tripletlib.__all__:
        entries = [entry for page in api for entry in page.find_all(id=f"tripletlib.{name}")]
        assert len(entries) == 1, name
        assert len(entries[0].find_next_sibling("dd").text) > 100, name


@chapters
def test_chapter_and_api_link_to_each_other(chapter, page, pages):
    used = {
        alias.name
        for cell in cells(chapter, "code")
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.ImportFrom) and node.module == "tripletlib"
        for alias in node.names
    }
    assert used
    links = [link["href"] for link in page.select("div.cell_input a[href]")]
    api = [page for address, page in pages.items() if address.startswith("docs/api/")]
    for name in used:
        assert any(link.endswith(f"#tripletlib.{name}") for link in links), name
        (entry,) = (entry for page in api for entry in page.find_all(id=f"tripletlib.{name}"))
        back = [link["href"] for link in entry.find_next_sibling("dd").find_all("a", href=True)]
        assert any(link.startswith(f"../../notebooks/{chapter.stem}.html#") for link in back), name


def test_what_a_function_returns_is_linked_to_the_chapters_that_call_it(pages):
    for page, name in (
        ("training", "History"),
        ("verification", "VerificationReport"),
        ("data", "data.Emoji"),
    ):
        entry = pages[f"docs/api/{page}.html"].find(id=f"tripletlib.{name}")
        assert "In the book: " in entry.find_next_sibling("dd").text, name


def test_no_line_ends_inside_a_number(pages):
    for address, page in pages.items():
        for text in page.find_all(string=re.compile(r"\d %|\b\d+ 000\b")):
            as_it_is = text.find_parent(["code", "pre", "script", "summary", "title"])
            assert as_it_is or text.find_parent(class_="cell_output"), (address, text)
