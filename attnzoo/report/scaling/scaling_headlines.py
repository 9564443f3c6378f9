"""What the scaling tables say, in sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attnzoo.report.scaling.scaling_report import Scaling
from attnzoo.results.table import Table


def headlines(scaling: Scaling) -> list[str]:
    """The findings of the settings' model and GPU, most important first."""
    return [*_longest(scaling), *_crossovers(scaling), *_paths(scaling)]


def _longest(scaling: Scaling) -> Iterator[str]:
    settings = scaling.settings
    table = scaling.table("limits_by_gpu")
    row = next(row for row in table.rows if row["gpu"] == settings.gpu.title)
    text = {column.key: column.text(row[column.key]) for column in table.columns}
    yield (
        f"{settings.model.title} on {settings.gpu.title}, in tokens that fit {settings.share:.0%} "
        f"of its memory: {text['stored']} where attention "
        f"stores its matrices, {text['flash']} with FlashAttention, {text['flash_checkpointed']} "
        "with gradient checkpointing as well; "
        f"whole model: {text['training']} in training, {text['inference']} in decoding with a "
        "cache."
    )


def _crossovers(scaling: Scaling) -> Iterator[str]:
    settings, table = scaling.settings, scaling.table("crossovers")
    rows = [row for row in table.rows if row["causal"] == ("yes" if settings.is_causal else "no")]
    causality = "causal" if settings.is_causal else "not causal"
    for key, what in (
        ("macs", "in MACs"),
        ("seconds", f"by the roofline of {settings.gpu.title}"),
        ("flash", "in bytes kept for training"),
    ):
        found = sorted((row[key], row["variant"]) for row in rows if isinstance(row[key], int))
        never = [row["variant"] for row in rows if not isinstance(row[key], int)]
        if not found and never:
            yield (
                f"Against fused standard attention, {causality}, {what}: no variant ever needs "
                "less."
            )
        elif found:
            said = ", ".join(f"{variant} from n = {n:,}" for n, variant in found)
            yield f"Cheaper than standard, {causality}, {what}: {said}{_never(never)}."


def _never(variants: list[str]) -> str:
    return f"; never: {', '.join(variants)}" if variants else ""


def _paths(scaling: Scaling) -> Iterator[str]:
    table: Table = scaling.table("paths")
    slow: list[dict[str, Any]] = [
        row for row in table.rows[:-1] if isinstance(row["path"], int) and row["path"] > 1
    ]
    if slow:
        said = ", ".join(f"{row['path']:,} with {row['variant']}" for row in slow)
        yield (
            f"Layers until every token has seen every other at n = {scaling.settings.length:,}: "
            f"{said}; 1 with every variant whose A is dense."
        )
