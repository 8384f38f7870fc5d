"""What the site adds to Sphinx: notebooks' own metadata, mathematics, links to and from the API."""

from __future__ import annotations

import ast
import functools
import html
import inspect
import itertools
import json
import pydoc
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.logging import getLogger
from sphinx.util.nodes import make_refnode
from sphinx.writers.html5 import HTML5Translator

_CHAPTER = re.compile(r"notebooks/\d\d_")
_CALL = re.compile(r"(?:tripletlib\.)?([A-Za-z_][\w.]*)(?:\(.*\))?", re.DOTALL)
_PYTHON = ("ipython3", "python")
_BLOCK = re.compile(rf'<div class="highlight-(?:{"|".join(_PYTHON)}) .*?</pre>', re.DOTALL)
# Neither an attribute nor the name of an argument.
_NAME = re.compile(
    r'(?<!<span class="o">\.</span>)<span class="n">(\w+)</span>(?!<span class="o">=</span>)'
)
_ALT = re.compile(r'(?<=<img alt=")[^"]*')
# Of a number: between its thousands, and before its unit.
_INSIDE = re.compile(r"(?<=\d) (?=\d{3}(?!\d)|%)")
_log = getLogger(__name__)


def slug(title: str) -> str:
    """Give a heading the anchor that JupyterLab gives it."""
    return title.replace(" ", "-")


def prepare(app: Sphinx, docname: str, source: list[str]) -> None:
    """Say in Sphinx's words what the sources say in those of Jupyter and of GitHub."""
    if docname == app.config.root_doc:
        # The table has a page of its own, and contents are listed at the side.
        measured = "\n[What was measured](docs/measured.md), and how to repeat it.\n"
        page = re.sub(r"(?<=\n## Measured\n).*?(?=\n## )", measured, source[0], flags=re.DOTALL)
        source[0] = page + (Path(app.confdir) / "contents.md").read_text(encoding="utf-8")
    elif _CHAPTER.match(docname):
        notebook = json.loads(source[0])
        for cell in notebook["cells"]:
            metadata = cell["metadata"]
            if "alt" in metadata:
                metadata["mystnb"] = {"image": {"alt": metadata["alt"]}}
                for output in cell["outputs"]:
                    _describe(output.get("data", {}), metadata["alt"])
            if metadata.get("jupyter", {}).get("source_hidden"):
                metadata["tags"] = sorted({*metadata.get("tags", []), "hide-input"})
        source[0] = json.dumps(notebook)


def _describe(data: dict[str, str | list[str]], alt: str) -> None:
    """Give the still picture of a map to move about in the alternative text of its cell."""
    if "text/html" in data:
        code = "".join(data["text/html"])
        data["text/html"] = _ALT.sub(lambda _: html.escape(alt), code, count=1)


def keep_numbers_whole(app: Sphinx, doctree: nodes.document) -> None:
    """Let no line end inside a number, such as 60 000 or 5 %."""
    for text in list(doctree.findall(nodes.Text)):
        written = isinstance(
            text.parent, (nodes.FixedTextElement, nodes.literal, nodes.math, nodes.raw)
        )
        if not written and _INSIDE.search(text):
            text.parent.replace(text, nodes.Text(_INSIDE.sub("\N{NO-BREAK SPACE}", text)))


def inline_mathml(writer: HTML5Translator, node: nodes.math) -> None:
    """Write a formula in a line of text."""
    writer.body.append(_mathml(node, "inline"))
    raise nodes.SkipNode


def block_mathml(writer: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula on lines of its own."""
    writer.body.append(f'<div class="formula">{_mathml(node, "block")}</div>')
    raise nodes.SkipNode


def _mathml(node: nodes.Element, display: str) -> str:
    written = convert(node.astext(), display=display)
    if "\\" in written:
        _log.warning("no MathML for a command in %r", node.astext(), location=node)
    return written


def link_words(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Link inline code that names a part of the package, and each of the API's entries back."""
    entries = app.env.get_domain("py").objects
    for literal in list(doctree.findall(nodes.literal)):
        found = _CALL.fullmatch(literal.astext())
        if found is None or isinstance(literal.parent, nodes.reference):
            continue
        around = _entry_around(literal)
        for name in (f"{around}.{found[1]}", f"tripletlib.{found[1]}"):
            if name in entries and name != around:
                place = entries[name].docname, entries[name].node_id
                word = literal.deepcopy()
                literal.replace_self(make_refnode(app.builder, docname, *place, word, name))
                break
    if docname.startswith("docs/api/"):
        _name_chapters(app, doctree, docname)


def _entry_around(node: nodes.Node) -> str:
    """Give the full name of the class, or else the function, whose entry holds a node."""
    name = ""
    while node is not None:
        if isinstance(node, addnodes.desc) and node[0]["ids"]:
            name = node[0]["ids"][0]
        node = node.parent
    return name


def _name_chapters(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Name in each entry, below its first paragraph, the chapters that use it, and where."""
    uses = _uses(app.env)
    for entry in list(doctree.findall(addnodes.desc)):
        chapters = uses.get("".join(entry[0]["ids"]))
        if chapters:
            line = nodes.paragraph("", "In the book: ")
            for chapter, section in chapters.items():
                title = nodes.Text(app.env.titles[chapter].astext().partition(":")[0])
                line += make_refnode(app.builder, docname, chapter, section, title)
                line += nodes.Text(", ")
            line[-1] = nodes.Text(".")
            entry[-1].insert(entry[-1].first_child_matching_class(nodes.paragraph) + 1, line)


def _uses(env: BuildEnvironment) -> dict[str, dict[str, str]]:
    """Find for each name the chapters whose code uses it, and there the first section that does."""
    if not hasattr(env, "uses_in_chapters"):
        env.uses_in_chapters = {}
        for chapter in sorted(filter(_CHAPTER.match, env.found_docs)):
            doctree = env.get_doctree(chapter)
            imported = _imported(doctree)
            for code, tree in _code(doctree):
                section = code.parent
                while not isinstance(section, nodes.section):
                    section = section.parent
                for node in ast.walk(tree):
                    if isinstance(node, ast.Name) and node.id in imported:
                        for name in _names(imported[node.id]):
                            found = env.uses_in_chapters.setdefault(name, {})
                            found.setdefault(chapter, section["ids"][0])
    return env.uses_in_chapters


@functools.cache
def _names(name: str) -> tuple[str, ...]:
    """Give a name, and those that the class may have that the function so named returns."""
    made = pydoc.locate(name)
    if not inspect.isfunction(made):
        return (name,)
    places = itertools.accumulate(made.__module__.split("."), "{}.{}".format)
    return name, *(f"{place}.{made.__annotations__.get('return')}" for place in places)


def _code(doctree: nodes.document) -> Iterator[tuple[nodes.literal_block, ast.AST]]:
    """Give the blocks that are Python; what a cell prints is not, nor one with a magic command."""
    for block in doctree.findall(nodes.literal_block):
        if block.get("language") in _PYTHON:
            with suppress(SyntaxError):
                yield block, ast.parse(block.astext())


def _imported(doctree: nodes.document) -> dict[str, str]:
    """Give what a page imports of the package: its name there, and its full name."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for _, tree in _code(doctree)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("tripletlib.")
        for alias in node.names
    }


def link_code(
    app: Sphinx, docname: str, template: str, context: dict, doctree: nodes.document | None
) -> None:
    """Link in a page's blocks of code what it imports of the package."""
    if doctree is None or docname.startswith("docs/api/"):
        return
    entries = app.env.get_domain("py").objects
    imported = {k: entries[name] for k, name in _imported(doctree).items() if name in entries}

    def linked(name: re.Match) -> str:
        if name[1] not in imported:
            return name[0]
        entry = imported[name[1]]
        page = app.builder.get_relative_uri(docname, entry.docname)
        return f'<a href="{page}#{entry.node_id}">{name[0]}</a>'

    context["body"] = _BLOCK.sub(lambda block: _NAME.sub(linked, block[0]), context["body"])


def name_folds(
    app: Sphinx, docname: str, template: str, context: dict, doctree: nodes.document | None
) -> None:
    """Give the theme's buttons that unfold the list of pages a name for those who hear them."""
    if theirs := context.get("generate_toctree_html"):
        named = '<summary aria-label="Pages of this part">'
        context["generate_toctree_html"] = lambda *given, **options: str(
            theirs(*given, **options)
        ).replace("<summary>", named)


def open_with_the_front_page(app: Sphinx, problem: Exception | None) -> None:
    """Let the address of the folder, or ``index.html``, show the front page."""
    if problem is None and app.builder.name == "html":
        shutil.copyfile(app.outdir / f"{app.config.root_doc}.html", app.outdir / "index.html")


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell Sphinx of all this."""
    app.connect("source-read", prepare)
    app.connect("doctree-read", keep_numbers_whole, priority=400)  # before titles are gathered
    app.connect("doctree-resolved", link_words)
    app.connect("html-page-context", link_code)
    app.connect("html-page-context", name_folds, priority=900)  # after the theme
    app.connect("build-finished", open_with_the_front_page)
    app.add_html_math_renderer("mathml", (inline_mathml, None), (block_mathml, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
