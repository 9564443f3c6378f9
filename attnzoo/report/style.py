"""How figures look: one colour and marker per variant, in registry order, and ink that a page can
recolour for dark mode."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnzoo.registry import names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT = "#1f2328", "#d0d7de"  # text and axes, grid: the page swaps these two in dark mode
# After Okabe and Ito (2008), without the yellow that white paper swallows: told apart with every
# common colour blindness. Six more, each as far as can be from all before it and from ink, in
# CIELAB and under simulated colour blindness.
PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#8700f0",
    "#784b1e",
    "#9678ff",
    "#d2b469",
    "#962d69",
    "#f01e5a",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", "*", ">", "d", "h")
LINES = ("-", "--", ":", "-.")

RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so every machine draws the same
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 2.2,
    "legend.columnspacing": 1.4,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "path",
    "image.cmap": "viridis",
}


@dataclass(frozen=True)
class Style:
    """color and marker tell the variant; line and filled tell one set of its options from
    another."""

    color: str
    marker: str
    line: str
    filled: bool

    def line_options(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot`."""
        face = self.color if self.filled else "none"
        return {
            "color": self.color,
            "marker": self.marker,
            "linestyle": self.line,
            "markerfacecolor": face,
            "markersize": 6,
            "linewidth": 1.6,
        }

    def point_options(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot` for a single point."""
        return {**self.line_options(), "linestyle": "none", "markersize": 8, "markeredgewidth": 1.6}


def styles(variants: Iterable[tuple[str, str]]) -> dict[str, Style]:
    """A style for every label, from (variant, label) pairs. Exact attention, first in the registry,
    is drawn in ink.

    A label whose variant is not in the registry takes the look of a variant that is not drawn, as
    long as there is one; if it can, one of a colour and a marker that no other has.
    """
    pairs = list(dict.fromkeys(variants))
    order = {name: index for index, name in enumerate(names())}
    shown = {variant for variant, _ in pairs}
    free = [index for name, index in order.items() if name not in shown and index > 0]
    order = {name: index for name, index in order.items() if name in shown}
    unknown = dict.fromkeys(variant for variant, _ in pairs if variant not in order)
    for number, variant in enumerate(unknown):
        order[variant] = _least_alike(free, order.values()) if free else len(names()) + number
    found: dict[str, Style] = {}
    twins: dict[str, int] = {}
    for variant, label in pairs:
        if label in found:
            continue
        twin = twins[variant] = twins.get(variant, -1) + 1
        index = order[variant]
        found[label] = Style(*_look(index), LINES[twin % len(LINES)], twin % 2 == 0)
    return found


def _look(index: int) -> tuple[str, str]:
    """Colour and marker of the variant of this place in the registry."""
    color = INK if index == 0 else PALETTE[(index - 1) % len(PALETTE)]
    return color, MARKERS[index % len(MARKERS)]


def _least_alike(free: list[int], taken: Iterable[int]) -> int:
    """Take one out of the free places: the last of those whose looks share least with the taken."""
    used = {part for index in taken for part in _look(index)}
    best = min(reversed(free), key=lambda index: len(used.intersection(_look(index))))
    free.remove(best)
    return best


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, outside pyplot's global state, and so in the style in
    force: see `attnzoo.report.export`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
