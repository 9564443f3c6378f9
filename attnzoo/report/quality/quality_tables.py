"""The numbers of a quality study as tables: every layer swapped, one layer at a time, and the mixes
found, for the screen and the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median

from attnzoo.quality.quality_rows import EXACT, Row
from attnzoo.results.table import Column, Table
from attnzoo.results.units import count, percent

HOPELESS = 1e5  # perplexities from here on, and ratios, are written by their power of ten
TOLERATED = 0.01  # a layer tolerates a choice that changes the model by less


def tables(rows: Sequence[Row]) -> list[Table]:
    """The tables that the rows have numbers for."""
    found = [*_all_layers(rows), *_one_layer(rows), *_mixes(rows)]
    return [table for table in found if table.rows]


def embeds(rows: Iterable[Row]) -> bool:
    """Whether the rows are an encoder's."""
    return any(row.cosine is not None for row in rows)


def change_in_words(rows: Sequence[Row]) -> str:
    """What `Row.change`, as a share, says."""
    return (
        "distance to the exact embedding (1 - cosine)" if embeds(rows) else "change of perplexity"
    )


def as_share(row: Row) -> float | None:
    """The change as a share: 0.01 is a perplexity 1% over exact, or a cosine of 0.99."""
    if row.change is None or row.cosine is not None:
        return row.change
    return math.expm1(row.change)


def sources(rows: Iterable[Row]) -> list[str]:
    """The texts, in their order."""
    return list(dict.fromkeys(row.text for row in rows))


def saved(part: int | None, whole: int | None) -> float | None:
    """The share of `whole` that is not spent."""
    return None if part is None or not whole else 1 - part / whole


def _whole_percent(share: float) -> str:
    """A saving, never -0%."""
    return percent(round(share, 2) + 0.0)


def change_of(row: Row) -> str:
    """A row's change in words: "cosine 0.977", "+2.3%"."""
    share = as_share(row)
    return (
        "no number"
        if share is None
        else signed(share)
        if row.cosine is None
        else f"cosine {row.cosine:.3f}"
    )


def signed(share: float) -> str:
    """0.012 -> +1.2%; large ones as a ratio: 3.2 -> 4.2x, and hopeless ones by their power of
    ten."""
    if share < 1:
        return f"{share:+.1%}"
    return f"{1 + share:,.3g}x" if share < HOPELESS else f"{_power(1 + share)}x"


MACS = (
    Column("attention_macs", "attention MACs", count),
    Column("attention_saved", "saved", _whole_percent),
    Column("model_saved", "of the model", _whole_percent),
)


def _saved(row: Row) -> dict[str, object]:
    return {
        "attention_macs": row.attention_macs,
        "attention_saved": saved(row.attention_macs, row.exact_attention_macs),
        "model_saved": saved(row.model_macs, row.exact_model_macs),
    }


def _all_layers(rows: Sequence[Row]) -> Iterable[Table]:
    chosen = [
        row for row in rows if row.task == "all" or (row.task == "exact" and row.part == "final")
    ]
    for source in sources(chosen):
        own = [row for row in chosen if row.text == source]
        yield _embeddings(own) if embeds(own) else _perplexities(own)


def _perplexities(rows: list[Row]) -> Table:
    swept = [row for row in rows if row.task == "all"]
    lengths = sorted({row.length for row in swept})
    own = [row for row in rows if row.length in lengths]
    found = []
    for label in dict.fromkeys(row.label for row in own):
        by_length = {row.length: row for row in own if row.label == label}
        last = by_length.get(lengths[-1]) if lengths else None
        if last is None or all(row.perplexity is None for row in by_length.values()):
            continue
        perplexities = {
            str(length): getattr(by_length.get(length), "perplexity", None) for length in lengths
        }
        share = None if label == EXACT else as_share(last)
        found.append({"label": label, **perplexities, "change": share, **_saved(last)})
    columns = (
        Column("label", "every layer", words=True),
        *(Column(str(length), f"{length:,}", _perplexity) for length in lengths),
        Column("change", "change", signed),
        *MACS,
    )
    source = rows[0].text
    return Table(
        f"all-{_file(source)}",
        f"{rows[0].model} on {source}: perplexity with every layer swapped",
        "a column a length in tokens, the shorter the beginning of the longest; change (from twice "
        "on as a ratio), MACs and savings at the longest",
        columns,
        tuple(found),
        notes=_reasons(swept),
    )


def _embeddings(rows: list[Row]) -> Table:
    own = [row for row in rows if row.cosine is not None]
    found = [
        {
            "label": row.label,
            "length": row.length,
            "cosine": row.cosine,
            "top1": row.top1,
            "top10": row.top10,
            **_saved(row),
        }
        for row in sorted(own, key=lambda row: row.length)
    ]
    columns = (
        Column("label", "every layer", words=True),
        Column("length", "n"),
        Column("cosine", "cosine", ".4f"),
        Column("top1", "top-1", percent),
        Column("top10", "top-10", percent),
        *MACS,
    )
    source, passages = rows[0].text, max((row.predictions or 0 for row in own), default=0)
    return Table(
        f"all-{_file(source)}",
        f"{rows[0].model} on {source}: sentence embeddings with every layer swapped",
        f"{passages} passages at most, every sixth a query; cosine: mean, to the exact embedding; "
        "top-1, top-10: share of what exact retrieves",
        columns,
        tuple(found),
        notes=_reasons(rows),
    )


def _one_layer(rows: Sequence[Row]) -> Iterable[Table]:
    tried = [row for row in rows if row.task == "layer"]
    for source in sources(tried):
        own = [row for row in tried if row.text == source]
        found = []
        for label in dict.fromkeys(row.label for row in own):
            shares = {
                row.layer: share
                for row in own
                if row.label == label and (share := as_share(row)) is not None
            }
            if shares:
                most, least = (
                    max(shares, key=lambda layer: shares[layer]),
                    min(shares, key=lambda layer: abs(shares[layer])),
                )
                tolerant = sum(abs(share) < TOLERATED for share in shares.values())
                found.append(
                    {
                        "label": label,
                        "tolerant": f"{tolerant} of {len(shares)}",
                        "median": median(shares.values()),
                        "least": f"{least} ({signed(shares[least])})",
                        "most": f"{most} ({signed(shares[most])})",
                    }
                )
        columns = (
            Column("label", "one layer", words=True),
            Column("tolerant", f"layers within {TOLERATED:.0%}"),
            Column("median", "median", signed),
            Column("least", "least changed by layer"),
            Column("most", "most changed by layer"),
        )
        title = f"{own[0].model} on {source}, {own[0].length:,} tokens: one layer at a time"
        yield Table(
            f"layers-{_file(source)}",
            title,
            change_in_words(own),
            columns,
            tuple(found),
            notes=_reasons(own),
        )


def _mixes(rows: Sequence[Row]) -> Iterable[Table]:
    chosen = [row for row in rows if row.task == "mix"]
    if not chosen:
        return
    if embeds(chosen):
        scores = (
            Column("cosine", "cosine", ".4f"),
            Column("top1", "top-1", percent),
            Column("top10", "top-10", percent),
        )
    else:
        scores = (
            Column("perplexity", "perplexity", _perplexity),
            Column("change", "change", signed),
        )
    columns = (
        Column("tolerance", "within", lambda value: f"{value:.0%}"),
        Column("text", "text", words=True),
        Column("length", "n"),
        *scores,
        *MACS,
    )
    found = [
        {
            "tolerance": row.tolerance,
            "text": row.text,
            "length": row.length,
            "perplexity": row.perplexity,
            "cosine": row.cosine,
            "top1": row.top1,
            "top10": row.top10,
            "change": as_share(row),
            **_saved(row),
        }
        for row in chosen
    ]
    said = {f"within {row.tolerance:.0%}: {row.label}": None for row in chosen}
    yield Table(
        "mixes",
        f"{chosen[0].model}: the cheapest mix of attentions that was found within a tolerance",
        f"{change_in_words(chosen)}, on text that chose nothing; layers that are not named stay "
        "exact",
        columns,
        tuple(found),
        notes=tuple(said),
    )


def _reasons(rows: Iterable[Row]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(f"{row.label}: {row.reason}" for row in rows if row.reason))


def _perplexity(value: float) -> str:
    if value < 100:
        return f"{value:.2f}"
    return f"{value:,.0f}" if value < HOPELESS else _power(value)


def _power(value: float) -> str:
    """42830000 -> 4.3e7."""
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e{int(exponent)}"


def _file(source: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in source)
