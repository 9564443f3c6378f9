"""How a table of this library looks on the screen."""

from __future__ import annotations

from rich import box
from rich.table import Table


def plain_table(gap: int = 2) -> Table:
    """An empty table with a rule below the headings and nothing else, `gap` spaces between
    columns."""
    return Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, gap - 1, 0, 0),
        header_style="bold",
        safe_box=True,
    )
