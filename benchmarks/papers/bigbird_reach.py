"""BigBird's building blocks by reach: after how many layers has every token heard of every other?

    python -m benchmarks.papers.bigbird_reach [--quick] [--redraw]

Random blocks alone, window alone, both, and both with global blocks, as in the paper's Table 1, and
a window as wide as all three together. Blocks of 64, the paper's 3 random, 3 window and 2 global
ones. A breadth-first search over the support of A, heads joined, with one head and with the 12 of
the base model, whose random blocks differ. layers: the most of three draws; never: draws after
which some pair never meets, since a block may be in nobody's random three.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import attnzoo
from attnzoo.cost.path_lengths import known_path
from benchmarks.papers.study import Row, length_axis, panels, run

NAME = "bigbird_reach"
LENGTHS = tuple(2**power for power in range(9, 17))
HEADS, SEEDS = (1, 12), 3
#: random, window and global blocks; a block of its own is window enough for a random graph.
ABLATION = {
    "random": (3, 1, 0),
    "window": (0, 3, 0),
    "random + window": (3, 3, 0),
    "random + window + global": (3, 3, 2),
    "window of 9 blocks": (0, 9, 0),
}


def layers_needed(blocks: tuple[int, int, int], length: int, heads: int, seed: int) -> int | None:
    """Fewest layers that connect every pair of `length` tokens; None when none do."""
    random, window, everywhere = blocks
    attention = attnzoo.build(
        "bigbird",
        heads=heads,
        head_dim=64,
        num_random_blocks=random,
        num_window_blocks=window,
        num_global_blocks=everywhere,
        seed=seed,
    )
    return known_path(attention, length, is_causal=False)


def measure(quick: bool) -> Iterator[Row]:
    for heads in HEADS:
        for name, blocks in ABLATION.items():
            for length in LENGTHS[:4] if quick else LENGTHS:
                found = [
                    layers_needed(blocks, length, heads, seed)
                    for seed in range(SEEDS if blocks[0] else 1)
                ]
                layers = max((x for x in found if x is not None), default=None)
                row: Row = {
                    "attention": name,
                    "blocks": list(blocks),
                    "heads": heads,
                    "length": length,
                    "layers": layers,
                }
                yield {**row, "never": found.count(None), "by_seed": found}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Layers against tokens, one head and twelve."""
    from attnzoo.report.axes import log_axis
    from attnzoo.report.style import LINES, MARKERS, PALETTE

    with panels(path) as axes:
        for one, heads in zip(axes, HEADS, strict=True):
            for index, name in enumerate(ABLATION):
                found = [row for row in rows if row["attention"] == name and row["heads"] == heads]
                line = LINES[index % len(LINES)]
                # None leaves a gap.
                lengths, layers = (
                    [row["length"] for row in found],
                    [row["layers"] for row in found],
                )
                one.plot(
                    lengths,
                    layers,
                    line,
                    color=PALETTE[index],
                    marker=MARKERS[index],
                    markersize=9 - 1.2 * index,
                    label=name,
                )
            one.axhline(12, color="#1f2328", linewidth=0.8, linestyle=":")
            length_axis(one, (row["length"] for row in rows), "tokens")
            log_axis(one, "y", [row["layers"] for row in rows], "{:g}".format)
            one.set_ylabel("layers until all pairs are connected")
            one.set_title(f"{heads} head{'s' if heads > 1 else ''} (dotted: 12 layers)")


if __name__ == "__main__":
    run(NAME, measure, draw)
