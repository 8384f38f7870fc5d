"""The rules that every chapter of the book keeps."""

import ast
import functools
import itertools
import re
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
SCRIPTS = sorted(NOTEBOOKS.glob("*.py"))
LARGEST = 2_400_000
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/(home|root|Users|tmp|var|work|usr|opt)/|[A-Z]:\\\\?\w")
# As ipykernel installs it, and so as JupyterLab writes it.
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")

chapters = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def notebook(script):
    return nbformat.read(script.with_suffix(".ipynb"), as_version=4)


def code_cells(script):
    return [cell for cell in notebook(script).cells if cell.cell_type == "code"]


@functools.cache
def texts_of(page):
    """Give the texts of a chapter cell by cell, or that of a page as a whole."""
    if page.suffix == ".md":
        return [page.read_text(encoding="utf-8")]
    return [cell.source for cell in jupytext.read(page).cells if cell.cell_type == "markdown"]


def text_of(output):
    if output.output_type == "stream":
        return output.text
    data = output.get("data", {})
    return "".join(str(text) for kind, text in data.items() if kind.startswith("text/"))


def test_there_are_chapters_each_with_a_notebook_and_they_are_numbered_in_order():
    assert len(SCRIPTS) >= 5
    assert {script.stem for script in SCRIPTS} == {file.stem for file in NOTEBOOKS.glob("*.ipynb")}
    numbers = [int(script.stem[:2]) for script in SCRIPTS]
    assert numbers == list(range(1, len(SCRIPTS) + 1))


@chapters
def test_script_and_notebook_hold_the_same_cells(script):
    def essence(book):
        return [
            (cell.cell_type, cell.source, *map(cell.metadata.get, ("alt", "jupyter", "tags")))
            for cell in book.cells
        ]

    assert essence(notebook(script)) == essence(jupytext.read(script))


@chapters
def test_jupyterlab_finds_nothing_to_change_in_a_chapter_that_it_opens_and_saves(script):
    book = notebook(script)
    assert book.nbformat_minor == 5
    assert book.metadata.kernelspec == KERNEL
    assert set(book.metadata) == {"jupytext", "kernelspec", "language_info"}
    # No times of execution, no state of a view.
    for cell in book.cells:
        assert set(cell.metadata) <= {"alt", "jupyter", "lines_to_next_cell", "tags"}, cell.source
    written = script.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert written == nbformat.writes(book) + "\n"


@chapters
def test_jupytext_of_any_version_finds_nothing_to_change_in_a_script(script):
    written = script.read_text(encoding="utf-8")
    assert written == jupytext.writes(notebook(script), fmt="py:percent")
    assert "jupytext_version: " not in written


@chapters
def test_notebook_was_run_once_in_order_without_error(script):
    cells = [cell for cell in code_cells(script) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [(cell, output) for cell in cells for output in cell.outputs]
    assert outputs
    for cell, output in outputs:
        expected = "raises-exception" in cell.metadata.get("tags", [])
        assert output.output_type != "error" or expected, cell.source
        assert output.get("name") != "stderr", output.text
        assert "\r" not in text_of(output), "a bar is kept in its last state"


@chapters
def test_notebook_is_small_and_tells_nothing_of_the_machine_it_was_made_on(script):
    assert script.with_suffix(".ipynb").stat().st_size <= LARGEST
    for cell in code_cells(script):
        for output in cell.outputs:
            assert not ABSOLUTE_PATH.search(text_of(output)), text_of(output)


@chapters
def test_figures_are_many_and_no_output_is_the_bare_text_of_an_object(script):
    cells = code_cells(script)
    figures = sum("image/png" in out.get("data", {}) for cell in cells for out in cell.outputs)
    assert figures >= max(3, len(cells) / 10)
    for cell in cells:
        for output in cell.outputs:
            assert not re.search(r"<[\w.]+( object)? at 0x|^<Axes|^\[<", text_of(output))


@chapters
def test_chapter_has_its_parts(script):
    text = "\n".join(texts_of(script))
    assert re.match(rf"# {int(script.stem[:2])} · ", text)
    for part in ("You will learn", "You need", "Running time", "## When it goes wrong"):
        assert part in text
    for part in ("## Exercises", "## Summary", "References"):
        assert part in text
    (how,) = re.findall("^## Exercises\n\n(.+)", text, re.MULTILINE)
    assert "unfold" in how
    assert "the three dots" in how
    solutions = [c for c in code_cells(script) if c.metadata.get("jupyter") == HIDDEN]
    assert len(solutions) >= 3
    assert sum("assert" in cell.source for cell in code_cells(script)) >= 5


HIDDEN = {"source_hidden": True}


@chapters
def test_what_is_asserted_is_shown_in_the_same_cell(script):
    for cell in code_cells(script):
        asserts = any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(cell.source)))
        if asserts and not cell.source.startswith("# Solution"):
            assert cell.outputs, cell.source


@chapters
def test_every_figure_has_an_alternative_text(script):
    for cell in code_cells(script):
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            assert 60 <= len(cell.metadata.get("alt", "")) <= 400, cell.source
        else:
            assert "alt" not in cell.metadata, cell.source


@chapters
def test_a_solution_is_folded_with_all_it_tells_and_has_an_answer_in_words(script):
    cells = notebook(script).cells
    first = next(i for i, cell in enumerate(cells) if cell.source.startswith("## Exercises"))
    solutions = [i for i, cell in enumerate(cells) if cell.source.startswith("# Solution")]
    assert len(solutions) >= 3
    for number, place in enumerate(solutions, start=1):
        asked, attempt, solution, answer = cells[place - 2 : place + 2]
        assert place > first
        assert f"**{number}.** " in asked.source
        assert attempt.source == "# Your attempt"
        assert solution.source.startswith(f"# Solution {number}\n")
        assert "assert" in solution.source
        assert solution.metadata.jupyter == HIDDEN
        assert "hide-input" in solution.metadata.tags
        assert not solution.outputs, solution.source
        assert FOLDED.fullmatch(answer.source), answer.source


FOLDED = re.compile(r"<details><summary>Answer( \d+)?</summary>\n\n.{40,}\n\n</details>", re.DOTALL)


@chapters
def test_five_questions_to_check_oneself_each_with_a_folded_answer(script):
    texts = texts_of(script)
    first = next(i for i, text in enumerate(texts) if text.startswith("## Check yourself"))
    assert texts[first + 6].startswith("## Summary")
    for number, text in enumerate(texts[first + 1 : first + 6], start=1):
        question, answer = text.split("\n\n<details>")
        assert question.startswith(f"**{number}.** ")
        assert FOLDED.fullmatch("<details>" + answer), text
    assert len(re.findall(r"^- ", texts[first + 6], re.MULTILINE)) <= 5


PAGES = [*SCRIPTS, NOTEBOOKS / "glossary.md", ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_resolve(page):
    links = LINK.findall("\n".join(texts_of(page)))
    for link in links:
        if not re.match(r"https?:|mailto:", link):
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_of_text_ends_inside_a_number(page):
    text = "\n".join(texts_of(page))
    without_code = re.sub(
        r"(?ms)^```.*?^```|^    [^\n]*|`[^`\n]*`|\$[^$\n]*\$|\]\([^)]*\)", "", text
    )
    # A no-break space between thousands and before a percent sign, which editors show.
    assert re.findall(r"\d (?:\d{3}(?!\d)|%)", without_code) == []


def test_a_word_of_the_glossary_stands_in_the_chapter_that_is_named():
    (table,) = texts_of(NOTEBOOKS / "glossary.md")
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| \[(\d+)\]\(([^)]+)\) \|$", table, re.MULTILINE)
    assert len(rows) > 50
    order = [re.sub(r"\W", "", words).casefold() for words, _, _ in rows]
    assert order == sorted(order)
    for words, number, page in rows:
        assert page.startswith(f"{int(number):02}_")
        text = " ".join(texts_of((NOTEBOOKS / page).with_suffix(".py")))
        text = re.sub(r"\*|\s+", lambda found: " " * found[0].isspace(), text).casefold()
        for word in re.split(r", |[()]", words):
            assert word.strip().removesuffix("se").casefold() in text, (word, page)


def test_chapters_link_to_their_neighbours():
    for before, after in itertools.pairwise(SCRIPTS):
        assert f"({after.stem}.ipynb)" in before.read_text(encoding="utf-8")
        assert f"({before.stem}.ipynb)" in after.read_text(encoding="utf-8")


def test_readme_lists_every_chapter_and_every_public_name_is_documented():
    import tripletlib

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for script in SCRIPTS:
        assert f"(notebooks/{script.stem}.ipynb)" in readme
    for name in tripletlib.__all__:
        assert getattr(tripletlib, name).__doc__, name


def test_the_first_chapter_and_the_readme_say_how_to_run_and_to_leave_a_chapter():
    first = "\n".join(texts_of(SCRIPTS[0]))
    for words in ("**Shift+Enter**", "*Run ▸ Run All Cells*", "*Kernel ▸ Shut Down All Kernels*"):
        assert words in first
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for words in ("`--no-browser`", "`01_data.ipynb` from the list", "Shut Down All Kernels*"):
        assert words in readme


def test_the_citation_names_the_version_and_the_licence_of_the_package():
    package = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    for key in ("version", "license"):
        (value,) = re.findall(rf'^{key} = "(.+)"$', package, re.MULTILINE)
        assert f"\n{key}: {value}\n" in citation
    (author,) = re.findall(r'^authors = \[\{ name = "(.+)" \}\]$', package, re.MULTILINE)
    assert f'\nauthors:\n  - name: "{author}"\n' in citation
