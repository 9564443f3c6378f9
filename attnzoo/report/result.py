"""What a study found, in one value: rows, tables, figures and a page, for a program, a notebook and
the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from attnzoo.arguments import nearest
from attnzoo.packages import require
from attnzoo.report.export import write_figures
from attnzoo.report.figures import Drawing
from attnzoo.report.style import RC
from attnzoo.results.output import check_folder, write_text
from attnzoo.results.table import Table, html_items

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

Named = TypeVar("Named", Table, Drawing)


@dataclass(frozen=True, repr=False)
class Result:
    """What `attnzoo.bench`, `compare`, `train` or `cost_table` found. A notebook shows its first
    table.

    name: of its files.
    rows: everything that was measured, a dataclass each; none where all is computed.
    tables: the first holds what was asked for, the others look at it from other sides.
    draw: makes the figures.
    page: writes the HTML page.
    texts: writes further files, by their names.
    interrupted: what Ctrl-C or a lost device cut off, in words; empty when nothing was.
    """

    name: str
    rows: tuple[Any, ...]
    tables: tuple[Table, ...]
    draw: Callable[[], list[Drawing]]
    page: Callable[[], str]
    texts: Mapping[str, Callable[[], str]] = field(default_factory=dict)
    interrupted: str = ""

    def table(self, name: str | None = None) -> Table:
        """A table by its name, or the first. Raises ValueError on another name."""
        return _find("table", name, self.tables)

    def plot(self, name: str | None = None) -> Figure:
        """A figure by its name, or the first, as matplotlib's.

        Raises ValueError on another name and where there are no numbers to draw, ImportError
        without matplotlib.
        """
        require("plot()", ["matplotlib"])
        from matplotlib import rc_context

        with rc_context(RC):
            return _find("figure", name, self.draw()).whole()

    def to_frame(self, name: str | None = None) -> DataFrame:
        """The exact values of a table, by its name or the first, a column for each of its keys.

        Raises ValueError on another name, ImportError without pandas.
        """
        require("to_frame()", ["pandas"])
        from pandas import DataFrame

        table = self.table(name)
        keys = [column.key for column in table.columns]
        return DataFrame([[row[key] for key in keys] for row in table.rows], columns=keys)

    def save(self, folder: str | Path = "report") -> list[Path]:
        """Write the page, the figures and the further files into a folder; return their paths.

        Raises ValueError, one sentence, when the folder cannot be written, ImportError without
        matplotlib.
        """
        require("save()", ["matplotlib"])
        place = check_folder(folder)
        written = [write_text(place / name, text()) for name, text in self.texts.items()]
        written.append(write_text(place / f"{self.name}.html", self.page()))
        return written + write_figures(self.draw(), place, f"{self.name}-")

    def __str__(self) -> str:
        return "\n".join([*filter(None, [self.interrupted]), str(self.table())])

    def __repr__(self) -> str:
        tables = ", ".join(table.name for table in self.tables)
        return f"Result({self.name}: {len(self.rows)} rows, tables {tables})"

    def _repr_html_(self) -> str:
        cut = f"<p><strong>{escape(self.interrupted)}</strong></p>" if self.interrupted else ""
        more = [f"{table.title}: .table({table.name!r})" for table in self.tables[1:]]
        return cut + self.table().to_html() + (f"<ul>{html_items(more)}</ul>" if more else "")


def _find(kind: str, name: str | None, found: Iterable[Named]) -> Named:
    """The one with that name, or the first."""
    by_name = {one.name: one for one in found}
    if not by_name:
        raise ValueError(f"there is no {kind}: the result holds no numbers for one")
    if name is None:
        return next(iter(by_name.values()))
    if name not in by_name:
        raise ValueError(
            f"there is no {kind} {name!r}{nearest(name, by_name)}; it has {', '.join(by_name)}"
        )
    return by_name[name]
