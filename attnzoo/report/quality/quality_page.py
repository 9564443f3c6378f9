"""A quality study as one HTML page that needs nothing else: what it says, figures, tables, how the
mixes were found, and where it ran."""

from __future__ import annotations

from collections.abc import Sequence

from attnzoo.quality.quality_rows import Row, in_order, page_name
from attnzoo.report.document import joined, results_document
from attnzoo.report.quality.quality_figures import drawings
from attnzoo.report.quality.quality_headlines import headlines
from attnzoo.report.quality.quality_tables import embeds, sources, tables
from attnzoo.report.result import Result
from attnzoo.results.table import html_items
from attnzoo.texts.text_parts import SAID

TITLE = "Which attention can be used where"
LEAD = (
    "A pretrained model, its weights untouched and nothing trained, with another attention in "
    "every layer, in one layer, or by layer. "
    "MACs are what each attention executes, exact attention's on its support alone."
)
METHOD = (
    "Every choice is tried in each layer alone, on text to choose by. A layer's choices on "
    "the lower convex hull of (MACs saved, change) "
    "become moves, all put in order of change per MAC saved, the change being the mean size over "
    "the texts.",
    "From exact attention everywhere, as many moves from the front are tried together as their "
    "changes, added, leave room for. Doubling and "
    "bisection then find how many can be made before the whole mix, measured on text to check "
    "against, leaves the tolerance on any text. The move "
    "that breaks it is dropped, and the search goes on behind it until no move is left or its "
    "evaluations are spent. The next tolerance starts "
    "from the mix of the last.",
    "The numbers reported are of a third text, which chose nothing.",
)


def quality_result(rows: Sequence[Row], interrupted: str = "") -> Result:
    """Rows of one model with their tables, figures and page."""
    ordered = in_order(rows)
    return Result(
        page_name(ordered[0]),
        tuple(ordered),
        tuple(tables(ordered)),
        lambda: drawings(ordered),
        lambda: page(ordered),
        interrupted=interrupted,
    )


def page(rows: Sequence[Row]) -> str:
    """The whole page, deterministic in `rows`."""
    answer = f"<ul>{html_items(headlines(rows))}</ul>"
    method = (
        f"<section>\n<h2>How the mixes were found</h2>\n<ol>{html_items(METHOD)}</ol>\n</section>\n"
        if _searched(rows)
        else ""
    )
    return results_document(
        f"{TITLE}: {rows[0].model}",
        LEAD,
        answer,
        drawings(rows),
        tables(rows),
        _facts(rows),
        method,
    )


def _searched(rows: Sequence[Row]) -> bool:
    return any(row.task == "mix" for row in rows)


def _facts(rows: Sequence[Row]) -> dict[str, str]:
    """What was read, and the environments of the rows, each fact with all its values."""
    found = {"tokens": _tokens(rows)}
    names = dict.fromkeys(name for source in sources(rows) for name in source.split("+"))
    found |= {
        name: SAID.get(name, "a file, in three thirds: to report on, to choose by, to check")
        for name in names
    }
    return found | joined(row.environment for row in rows)


def _tokens(rows: Sequence[Row]) -> str:
    longest = max(row.length for row in rows)
    what = (
        "passages of each text at most"
        if embeds(rows)
        else "sequence of each text"
        if rows[0].sequences == 1
        else "sequences of each text"
    )
    return f"{rows[0].sequences} {what}, up to {longest:,} tokens long"
