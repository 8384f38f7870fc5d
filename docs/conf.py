"""The book and the API as a web site: ``sphinx-build -c docs . build/site``.

Sphinx reads the repository itself and gives each page the address of its file, so that what is
linked in a clone is linked on the site. Nothing is executed, and nothing is fetched.
"""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

project = "Deep metric learning on a laptop"
author = project_copyright = "The tripletlib authors"

extensions = ["myst_nb", "sphinx.ext.autodoc", "numpydoc", "book"]
root_doc = "README"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "notebooks/*.ipynb",
    "notebooks/glossary.md",
    "docs/measured.md",
    "docs/api/*.rst",
    "tripletlib/data/LICENSE.md",
]
# Folders that Sphinx need not look into.
exclude_patterns = [".*", "build", "dist", "venv", "**/.*"]

# Chapters as they were committed.
nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_heading_slug_func = "book.slug"
# MathML, which browsers draw by themselves.
myst_update_mathjax = False
html_math_renderer = "mathml"

# Types stand in the docstrings, in words and with their shapes.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "extra_repr", "no-value": True}
numpydoc_show_class_members = False
default_role = "code"
smartquotes = False

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_use_index = html_domain_indices = False
# A page opened from the disk may not read others for the lines around what is found.
html_show_search_summary = False
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_theme_options = {
    "footer_content_items": ["author.html"],
    "navbar_persistent": [],
    "use_download_button": False,
    "use_fullscreen_button": False,
}
