"""What a quality study says, in sentences: which attention can be used where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from attnzoo.quality.quality_rows import EXACT, Row
from attnzoo.report.quality.quality_tables import (
    TOLERATED,
    as_share,
    change_of,
    embeds,
    saved,
    sources,
)


def headlines(rows: Sequence[Row]) -> list[str]:
    """The sentences that the rows have numbers for."""
    return [*_everywhere(rows), *_layers(rows), *_mixes(rows)]


def _everywhere(rows: Sequence[Row]) -> Iterator[str]:
    """The cheapest attention in every layer within each tolerance of the mixes, at the longest
    length; equal answers in one sentence."""
    swept = [row for row in rows if row.task == "all" and as_share(row) is not None]
    tolerances = sorted(
        {row.tolerance for row in rows if row.task == "mix" and row.tolerance is not None}
    ) or [TOLERATED]
    for source in sources(swept):
        longest = max(row.length for row in swept if row.text == source)
        own = [row for row in swept if row.text == source and row.length == longest]
        answers: dict[str, list[float]] = {}
        for tolerance in tolerances:
            answers.setdefault(_cheapest(own, tolerance), []).append(tolerance)
        for answer, shared in answers.items():
            yield f"{source}, {longest:,} tokens, {_within(shared, rows)}: {answer}"


def _cheapest(rows: list[Row], tolerance: float) -> str:
    saving = [row for row in rows if (saved(row.attention_macs, row.exact_attention_macs) or 0) > 0]
    if not saving:
        return "none of these attentions saves MACs"
    fitting = [row for row in saving if abs(as_share(row) or 0.0) <= tolerance]
    if not fitting:
        best = min(saving, key=lambda row: abs(as_share(row) or 0.0))
        return (
            f"no attention that saves MACs can be put into every layer; nearest is {best.label} "
            f"({change_of(best)})"
        )
    best = min(fitting, key=lambda row: row.attention_macs or 0)
    return f"in every layer {best.label} ({change_of(best)}) {_savings(best)}"


def _layers(rows: Sequence[Row]) -> Iterator[str]:
    """For each choice, the layers that tolerate it on every text."""
    tried = [row for row in rows if row.task == "layer" and row.layer is not None]
    for label in dict.fromkeys(row.label for row in tried):
        worst: dict[int, tuple[float, Row]] = {}
        for row in tried:
            share = as_share(row)
            if (
                row.label == label
                and row.layer is not None
                and share is not None
                and abs(share) >= worst.get(row.layer, (0.0, row))[0]
            ):
                worst[row.layer] = (abs(share), row)
        if worst:
            least = max(worst, key=lambda layer: worst[layer][0])
            tolerant = sum(share < TOLERATED for share, _ in worst.values())
            yield (
                f"{label} alone in one layer changes less than {TOLERATED:.0%} in {tolerant} of "
                f"{len(worst)} layers, "
                f"and most in layer {least} ({change_of(worst[least][1])})"
            )


def _mixes(rows: Sequence[Row]) -> Iterator[str]:
    """For each tolerance, the mix at the length at which it was chosen, where that was measured,
    and at the longest, on each text."""
    mixes = [row for row in rows if row.task == "mix"]
    chosen_at = max((row.length for row in rows if row.task == "layer"), default=0)
    for tolerance in sorted({row.tolerance for row in mixes if row.tolerance is not None}):
        own = [row for row in mixes if row.tolerance == tolerance]
        longest = max(row.length for row in own)
        found = [row for row in own if row.length == longest]
        if found[0].label == EXACT:
            yield f"{_within([tolerance], rows)}: no mix that saves MACs was found"
            continue
        changes = "; ".join(
            f"at {length:,} tokens "
            f"{', '.join(f'{change_of(row)} on {row.text}' for row in own if row.length == length)}"
            for length in sorted({row.length for row in own} & {chosen_at, longest})
        )
        yield (
            f"mix chosen to stay {_within([tolerance], rows)}, on unseen text: {changes}, where it "
            f"{_savings(found[0])}"
        )


def _savings(row: Row) -> str:
    attention, model = (
        saved(row.attention_macs, row.exact_attention_macs),
        saved(row.model_macs, row.exact_model_macs),
    )
    return (
        f"saves {attention or 0.0:.0%} of the attention's MACs and {model or 0.0:.1%} of the "
        "model's"
    )


def _within(tolerances: Sequence[float], rows: Iterable[Row]) -> str:
    if embeds(rows):
        return (
            "within a mean cosine of "
            f"{' or '.join(f'{1 - tolerance:g}' for tolerance in tolerances)}"
        )
    return (
        f"within {' or '.join(f'{tolerance:.0%}' for tolerance in tolerances)} of exact perplexity"
    )
