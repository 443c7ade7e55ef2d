"""Sphinx's configuration of the site; `docs/build.py` brings notebooks and pages together and calls Sphinx."""

import inspect
import re
from importlib.util import find_spec
from pathlib import Path

import dbb

MATHJAX = Path(find_spec("sphinx-mathjax-offline").origin).with_name("static") / "mathjax/tex-svg.js"

project = "Diverse Branch Block"
author = "The dbb contributors"
copyright = f"{author}, Apache-2.0"
release = version = dbb.__version__
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxarg.ext",
]
exclude_patterns = ["generated", "download", "extra"]  # parts of pages, and files to take away
suppress_warnings = ["mystnb.unknown_mime_type"]

# Notebooks come executed, through papermill: here they are only shown.
nb_execution_mode = "off"
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "text/markdown", 0)]
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

# The maths is one file of the site itself, with its fonts as paths: it works from a folder, and without a network.
mathjax_path = MATHJAX.name
mathjax3_config = {
    "options": {"enableMenu": False, "enableAssistiveMml": True},  # a menu takes the keyboard's focus at each formula
    "svg": {"displayAlign": "center", "fontCache": "global"},
}

autodoc_default_options = {"members": True, "member-order": "bysource", "ignore-module-all": True}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
default_role = "py:obj"  # single backticks: a link where a name is known, code where it is not
python_display_short_literal_types = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
viewcode_line_numbers = True

html_theme = "furo"
html_title = "Diverse Branch Block"
html_static_path = ["_static", str(MATHJAX)]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_favicon = "_static/icon.svg"
html_copy_source = False
html_show_search_summary = False  # it is fetched, which browsers refuse where a page is a file
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5cad", "color-brand-content": "#0b5cad"},
    "dark_css_variables": {"color-brand-primary": "#7db7ff", "color-brand-content": "#7db7ff"},
}
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
copybutton_exclude = ".linenos, .gp, .go"


# Docstrings are written to be read where they stand. For Sphinx, lines `name: what` become a list of parameters, and
# an indented example becomes a listing.
PARAMETER = re.compile(r"(?P<names>\w+(, \w+)*): (?P<what>.*)")


def typeset(app, kind, name, obj, options, lines):
    """Rewrite the docstring `lines` of an object in place."""
    known = set(parameters(obj)) if kind in ("class", "function", "method") else set()
    result: list[str] = []
    listed = False  # whether the line before belongs to a list of parameters
    for line in lines:
        match = PARAMETER.fullmatch(line)
        is_parameter = bool(match and known & set(match["names"].split(", ")))
        if is_parameter:
            line = f":param {match['names']}: {match['what']}"
        elif line.startswith("    ") and result[-2:-1] and not result[-1] and result[-2].endswith(":"):
            result[-2] += ":"
        belongs = is_parameter or (listed and line.startswith(" "))
        if result and result[-1] and line and belongs != listed:
            result.append("")
        result.append(line.replace("|", r"\|"))
        listed = belongs
    lines[:] = result


def parameters(obj):
    """The names that an object is called with, or keeps as its fields."""
    try:
        called = inspect.signature(obj).parameters
    except (TypeError, ValueError):
        called = ()
    return [*called, *getattr(obj, "__annotations__", ())]


def level_captions(app, page, template, context, doctree):
    """Give the captions of the sidebar, which are headings, their level: a screen reader asks for it."""
    tree = context.get("furo_navigation_tree", "")
    context["furo_navigation_tree"] = tree.replace('role="heading"', 'role="heading" aria-level="2"')


def setup(app):
    """Have Sphinx ask for them."""
    app.connect("autodoc-process-docstring", typeset)
    app.connect("html-page-context", level_captions, priority=900)  # behind the theme's own
