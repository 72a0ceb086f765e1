"""Sphinx's settings of the web edition. `run.py site` writes the pages that Sphinx reads."""

import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.logging import getLogger

project = "minimistral"
language = "en"
extensions = ["myst_nb", "sphinx.ext.githubpages"]
templates_path = ["templates"]

# The notebooks were run when they were built; here nothing runs.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_dmath_allow_digits = False  # "$5" in a sentence is no formula
myst_heading_anchors = 4

html_theme = "pydata_sphinx_theme"
html_title = "minimistral"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_math_renderer = "mathml"
html_search_scorer = str(Path(__file__).with_name("scorer.js"))
html_show_search_summary = False  # it would read every page that was found, and a page of a file may not
html_use_index = False
html_copy_source = False
html_show_sourcelink = False
html_sidebars = {"**": ["course-nav.html"]}
html_context = {"default_mode": "auto"}
html_theme_options = {
    "logo": {"text": "minimistral"},
    "search_bar_text": "Search all chapters",
    "navbar_center": [],
    "navbar_end": ["theme-switcher"],
    "article_header_start": [],
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
    "footer_start": ["project-note.html"],
    "footer_end": [],
}


def mathml(tex, block=False):
    """A formula as MathML, which browsers draw and read aloud themselves: no script, no fonts."""
    tex = re.sub(r"\\dots\b", r"\\ldots", tex)  # the one command of ours that docutils lacks
    return tex2mathml(tex, as_block=block)


def formula(translator, node):
    block = isinstance(node, nodes.math_block)
    try:
        drawn = mathml(node.astext(), block)
    except MathError as error:
        getLogger(__name__).warning("formula %r: %s", node.astext(), error, location=node)
        raise nodes.SkipNode from error
    translator.body.append(f'<div class="formula">{drawn}</div>' if block else drawn)
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
