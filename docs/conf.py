"""The site's settings: Sphinx reads them. `python3 dev.py docs` builds it into build/site."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from docutils import nodes
from pygments.lexers.special import TextLexer

from attnzoo.version import __version__
from docs import example_pages, reference_pages

project = "attnzoo"
author = "The attnzoo authors"
copyright = "The attnzoo authors, Apache-2.0"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.viewcode", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
exclude_patterns = ["**/README.md"]
highlight_language = "none"
smartquotes = False  # `--model` has two dashes
pygments_style, pygments_dark_style = "friendly", "monokai"
# Types of torch and others, in signatures: no page here says what they are.
nitpick_ignore_regex = [(r"py:.*", r".*")]
# Asked for by `python3 dev.py docs links` alone; the usual build reads nothing from the network.
linkcheck_timeout, linkcheck_retries = 20, 2

html_theme = "furo"
html_title = f"attnzoo {__version__}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
copybutton_prompt_text = "$ "


def captioned(app: Any, document: nodes.document) -> None:
    """Show what a picture that stands alone says of itself below it, too."""
    for number, image in enumerate(list(document.findall(nodes.image))):
        said, paragraph = image.get("alt"), image.parent
        if said and isinstance(paragraph, nodes.paragraph) and len(paragraph.children) == 1:
            caption = nodes.caption(said, said)
            ids = [f"figure-{number}"]
            paragraph.replace_self(nodes.figure("", image.deepcopy(), caption, ids=ids))


def listed(app: Any, document: nodes.document) -> None:
    """Show a drawing in Mermaid, which needs a program from elsewhere, as a list of its arrows."""
    for drawing in list(document.findall(nodes.literal_block)):
        if drawing.get("language") == "mermaid":
            lines = drawing.astext().splitlines()
            arrows = [line.split(" --> ") for line in lines if "-->" in line]
            said = [f"{one} → {others.replace(' & ', ', ')}" for one, others in arrows]
            items = [nodes.list_item("", nodes.paragraph(line, line)) for line in said]
            drawing.replace_self(nodes.bullet_list("", *items))


def setup(app: Any) -> None:
    """Write the API reference and the examples before pages are read."""
    app.add_lexer("mermaid", TextLexer)
    app.connect("doctree-read", captioned)
    app.connect("doctree-read", listed)
    reference_pages.write()
    example_pages.write()
