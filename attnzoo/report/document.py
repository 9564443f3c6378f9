"""What every HTML page is made of: the document with its style, figures as inline SVG, tables, and
the facts of where it ran."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

from attnzoo.report.export import inline_svg
from attnzoo.report.figures import Drawing
from attnzoo.results.table import Table

STYLE = """
:root { color-scheme: light dark;
  --ink: #1f2328; --faint: #d0d7de; --soft: #59636e; --paper: #ffffff; --raised: #f6f8fa;
  --bad: #b42318; --good: #1a7f37; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #3d444d; --soft: #9198a1; --paper: #0d1117; --raised: #151b23;
    --bad: #ff7b72; --good: #56d364; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem clamp(0.9rem, 3vw, 2.5rem) 4rem;
  background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: 0.5rem 0;
  text-wrap: balance; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 0.6rem; padding-top: 1rem;
  border-top: 1px solid var(--faint); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 0.3rem; }
p, li, figcaption { max-width: 46rem; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; }
.soft, figcaption, .notes { color: var(--soft); font-size: 0.9rem; }
.scroll { overflow-x: auto; margin: 0.8rem 0; border: 1px solid var(--faint); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.65rem; text-align: right; vertical-align: baseline; white-space: nowrap;
  border-bottom: 1px solid var(--faint); }
thead th { background: var(--raised); color: var(--soft); font-weight: 600; vertical-align: bottom;
  white-space: normal; }
tbody tr:last-child > * { border-bottom: 0; }
th.text, td.text { text-align: left; }
tbody th { position: sticky; left: 0; background: var(--paper); font-weight: 600;
  white-space: normal; min-width: 5.5rem; max-width: 15rem; }
thead th:first-child { position: sticky; left: 0; }
@media (max-width: 40rem) { td.text { white-space: normal; min-width: 8.6rem; } }
.bad { color: var(--bad); font-weight: 600; }
.good { color: var(--good); font-weight: 600; }
figure { margin: 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr));
  align-items: start; gap: 1rem 2rem; margin-top: 0.6rem; overflow-x: auto; }
.panels svg { width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1.2rem;
  font-size: 0.92rem; }
dt { font-weight: 600; }
dd { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
"""


def document(title: str, lead: str, body: str) -> str:
    """A page that needs nothing else.

    title: text.
    lead, body: HTML.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" '
        'content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{lead}</p>\n{body}\n</body>\n</html>\n"
    )


def results_document(
    title: str,
    lead: str,
    answer: str,
    drawings: Iterable[Drawing],
    tables: Iterable[Table],
    facts: Mapping[str, str],
    method: str = "",
) -> str:
    """The page of a result file: its answer (HTML), figures, every number, method (HTML, whole
    sections) and where it ran."""
    figures, numbers = (
        "\n".join(map(html_figure, drawings)),
        "\n".join(table.to_html() for table in tables),
    )
    listed = "\n".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items()
    )
    body = (
        f"<section>\n{answer}\n</section>\n<section>\n<h2>Figures</h2>\n{figures}\n</section>\n"
        f"<section>\n<h2>Every number</h2>\n{numbers}\n</section>\n{method}<section>\n<h2>Where it "
        f"ran</h2>\n<dl>\n{listed}\n</dl>\n</section>"
    )
    return document(title, lead, body)


def joined(environments: Iterable[Mapping[str, str] | None]) -> dict[str, str]:
    """The facts of several rows, each with all its values."""
    found: dict[str, list[str]] = {}
    for facts in environments:
        for name, text in (facts or {}).items():
            if text not in found.setdefault(name, []):
                found[name].append(text)
    return {name: "; ".join(texts) for name, texts in found.items()}


def html_figure(drawing: Drawing) -> str:
    """A figure's heading, caption and panels."""
    several = len(drawing.parts) > 1
    panels = "\n".join(
        inline_svg(
            part,
            f"{drawing.name}-{index}",
            f"{drawing.title}, panel {index}" if several else drawing.title,
        )
        for index, part in enumerate(drawing.parts, 1)
    )
    heading = (
        f"<h3>{escape(drawing.title)}</h3>\n<figcaption>{escape(drawing.caption)}</figcaption>"
    )
    return f'<figure>\n{heading}\n<div class="panels">{panels}</div>\n</figure>'
