"""Marked regions of a page: what stands between `<!-- table: NAME -->` and `<!-- end -->` is
written by a script, the rest by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

Table = Callable[..., str]  # of the words after its name: the lines between the marks
MARK = "<!-- table: "
REGION = re.compile(
    r"(<!-- table: (?P<name>[^\n]*?) -->\n)(?P<body>.*?)(?P<end><!-- end -->|<!-- table: |\Z)",
    re.DOTALL,
)


def rewritten(page: str, tables: Mapping[str, Table]) -> str:
    """The page with every region made anew. Raises ValueError on a table that is not known, and on
    a region without an end."""

    def write(found: re.Match[str]) -> str:
        name, *words = found["name"].split()
        if found["end"] != "<!-- end -->":
            raise ValueError(
                f"the region of table {found['name']!r} has no end; write <!-- end --> below it"
            )
        if name not in tables:
            raise ValueError(f"table {name!r} is unknown; there are {', '.join(tables)}")
        return f"{found[1]}\n{tables[name](*words).strip()}\n\n{found['end']}"

    return REGION.sub(write, page)


def markdown_table(headings: list[str], rows: list[list[str]]) -> str:
    """A table; every row has a cell a heading."""
    lines = [headings, *rows]
    written = [
        "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|" for cells in lines
    ]
    return "\n".join([written[0], "|" + "---|" * len(headings), *written[1:]])
