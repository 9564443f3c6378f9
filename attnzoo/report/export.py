"""Figures as files, and as SVG that can stand beside others in one page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from attnzoo.report.figures import Drawing
from attnzoo.report.style import FAINT, INK, RC

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 160
# How much larger and smaller than its natural size a page may draw a figure.
LARGEST, SMALLEST = (1.33, 0.75)
NO_SVG_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def write_figures(drawings: Iterable[Drawing], folder: Path, prefix: str) -> list[Path]:
    """Write every figure into `folder` as PNG and SVG, on white, its name behind `prefix`; return
    the paths. Equal input, equal bytes."""
    from matplotlib import rc_context

    written = []
    for drawing in drawings:
        with rc_context({**RC, "svg.hashsalt": drawing.name}):
            figure = drawing.whole()
            for ending, metadata in (("png", {"Software": None}), ("svg", NO_SVG_METADATA)):
                path = folder / f"{prefix}{drawing.name}.{ending}"
                figure.savefig(path, dpi=DOTS_PER_INCH, facecolor="white", metadata=metadata)
                written.append(path)
    return written


def inline_svg(draw: Callable[[], Figure], name: str, title: str) -> str:
    """The figure as an <svg> element for an HTML page: it scales with its place, its ids start with
    `name` so that no two figures share one, and its ink follows the page's colours --ink and
    --faint.

    title: what a screen reader says.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({**RC, "svg.hashsalt": name}):
        draw().savefig(buffer, format="svg", metadata=NO_SVG_METADATA)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="image[0-9a-f]+"', "", svg)  # nothing asks for it, and like images share it
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    return _scaled(svg, title)


def _scaled(svg: str, title: str) -> str:
    """Drop the fixed size and keep the viewBox; the natural width sets limits, so that text stays
    readable."""
    head, body = svg.split(">", 1)
    width = re.search(r'\bwidth="([\d.]+)pt"', head)
    head = re.sub(r'\s(width|height|xmlns|xmlns:xlink|version)="[^"]*"', "", head)
    pixels = float(width[1]) * 4 / 3 if width else 0.0
    limits = (
        f' style="max-width:{pixels * LARGEST:.0f}px;min-width:{pixels * SMALLEST:.0f}px"'
        if width
        else ""
    )
    return f'{head} role="img" aria-label="{escape(title)}"{limits}>{body}'.strip()
