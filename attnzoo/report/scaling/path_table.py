"""The longest path between two tokens with every variant, and what the layers of that path cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnzoo.cost.layer_costs import CountedVariant
from attnzoo.cost.path_lengths import known_path, longest_path, support
from attnzoo.report.scaling.model_tables import causality
from attnzoo.report.scaling.settings import Settings
from attnzoo.report.scaling.variant_tables import NEVER, filled
from attnzoo.results.table import Column, Table

SEARCHED_LENGTH = 512  # tokens of which every pair is looked at


def paths(
    settings: Settings, variants: Sequence[CountedVariant], baseline: CountedVariant
) -> Table:
    """Layers after which every token has seen every other, and the MACs of those layers
    together."""
    n, is_causal = settings.length, settings.is_causal
    exact = baseline.macs(n, is_causal)
    rows: list[dict[str, Any]] = []
    for variant in variants:
        row: dict[str, Any] = {"variant": variant.label}
        if variant.runs(is_causal):
            small = variant.attention(SEARCHED_LENGTH)
            seen = support(small, SEARCHED_LENGTH, is_causal)
            pairs = (
                SEARCHED_LENGTH * (SEARCHED_LENGTH + 1) // 2 if is_causal else SEARCHED_LENGTH**2
            )
            found, known = (
                longest_path(seen, is_causal),
                known_path(variant.attention(n), n, is_causal),
            )
            row |= {
                "density": 100 * int(seen.sum()) / pairs,
                "searched": NEVER if found is None else found,
                "path": known,
            }
            row["cost"] = None if known is None else known * variant.macs(n, is_causal) / exact
        rows.append(row)
    rows.append(
        {
            "variant": "a recurrent layer",
            "searched": SEARCHED_LENGTH - 1,
            "path": n - 1,
            "cost": n * settings.model.d**2 / exact,
        }
    )
    columns = (
        Column("variant", "variant", words=True),
        Column("density", f"pairs seen at {SEARCHED_LENGTH}, %", ",.1f"),
        Column("searched", f"longest path at {SEARCHED_LENGTH}"),
        Column("path", f"longest path at {n:,}"),
        Column("cost", "MACs until all is seen, of standard's", ",.3g"),
    )
    notes = (
        f"At {SEARCHED_LENGTH} tokens by breadth-first search over the pairs where A is not 0, "
        "heads joined.",
        f"At {n:,} by the closed form, or by a search over blocks; -: neither is known. Causal, a "
        "token need only be connected to those before it.",
        "A recurrent layer passes one token at a time, n·d² MACs: its row counts steps in one "
        "layer.",
    )
    title = f"Longest path between two tokens, in layers, {causality(settings)}"
    return Table(
        "paths",
        title,
        "fewest layers t with (I + A)ᵗ > 0 on all pairs",
        columns,
        filled(rows, columns),
        {"n": n},
        notes,
    )
