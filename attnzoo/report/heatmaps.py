"""Heat maps: A of every variant beside exact A, for one layer and head, on one colour scale."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from attnzoo.fidelity.comparison_rows import HeatMap
from attnzoo.report.comparison_columns import folded
from attnzoo.report.style import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAP_INCHES = 2.1
MAPS_IN_A_ROW = 3
# Ends of the colour scale: what lies below LEAST and above zero is drawn as LEAST.
LEAST, MOST = (1e-4, 1.0)
NEGATIVE = "#d1242f"
NOTHING = "#9ba4ae"  # grey: no colour of the scale, and seen on white and on black

MapGroup = tuple[str, bool, int, str, int]


def heat_map_groups(maps: Iterable[HeatMap]) -> dict[MapGroup, list[HeatMap]]:
    """Maps that belong in one figure: those of one model, length, layer and head."""
    groups: dict[MapGroup, list[HeatMap]] = {}
    for heat_map in maps:
        key = (heat_map.model, heat_map.is_causal, heat_map.length, heat_map.layer, heat_map.head)
        groups.setdefault(key, []).append(heat_map)
    return groups


def heat_map_names(groups: Iterable[MapGroup]) -> dict[MapGroup, str]:
    """A file name for the figure of each group: its model and causality, numbered from the second
    of a kind on."""
    found: dict[MapGroup, str] = {}
    for group in groups:
        model, is_causal = group[:2]
        stem = re.sub(
            r"[^a-z0-9]+", "-", f"heat-{model}-{'causal' if is_causal else 'bidirectional'}".lower()
        ).strip("-")
        twins = sum(name == stem or name.startswith(f"{stem}-") for name in found.values())
        found[group] = f"{stem}-{twins + 1}" if twins else stem
    return found


def heat_map_figure(maps: list[HeatMap]) -> Figure:
    """One square per map, in their order, one colour bar, and what the colours beside it mean."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.patches import Patch

    columns = min(len(maps), MAPS_IN_A_ROW)
    rows = -(-len(maps) // columns)
    figure = new_figure(MAP_INCHES * columns + 0.7, (MAP_INCHES + 0.1) * rows + 0.3)
    colors = colormaps["viridis"].with_extremes(bad=NOTHING)
    image, told = None, [Patch(color=NOTHING, label="0")]
    for index, heat_map in enumerate(maps):
        axes = figure.add_subplot(rows, columns, index + 1)
        weights = np.array(heat_map.weights)
        (left, right), (top, bottom) = heat_map.key_range, heat_map.query_range
        extent = (left, right, bottom, top)
        shown = np.where(weights > 0, weights.clip(LEAST, MOST), np.nan)
        image = axes.imshow(
            shown,
            norm=LogNorm(LEAST, MOST),
            cmap=colors,
            extent=extent,
            aspect="auto",
            interpolation="nearest",
        )
        if (weights < 0).any():
            told[1:] = [Patch(color=NEGATIVE, label="below 0")]
            axes.imshow(
                np.where(weights < 0, 1.0, np.nan),
                cmap=ListedColormap([NEGATIVE]),
                extent=extent,
                aspect="auto",
                interpolation="nearest",
            )
        axes.set_title(
            "exact attention"
            if index == 0 and heat_map.label == "standard"
            else folded(heat_map.label, 24),
            fontsize=9,
        )
        axes.set_box_aspect(1)
        axes.grid(False)
        axes.set_xticks(heat_map.key_range, [f"{token:,}" for token in heat_map.key_range])
        axes.set_yticks(heat_map.query_range, [f"{token:,}" for token in heat_map.query_range])
        axes.tick_params(labelsize=8, length=2)
        if index % columns:
            axes.set_yticklabels([])
        if index + columns < len(maps):
            axes.set_xticklabels([])
    figure.supxlabel("key (token)", fontsize=9.5)
    figure.supylabel("query (token)", fontsize=9.5)
    if image is not None:
        bar = figure.colorbar(image, ax=figure.axes, shrink=0.7, pad=0.03)
        bar.set_label("share of a query's mass", fontsize=9.5)
        bar.ax.tick_params(labelsize=8)
        figure.legend(handles=told, loc="outside lower right", ncols=2, fontsize=8.5, frameon=False)
    return figure
