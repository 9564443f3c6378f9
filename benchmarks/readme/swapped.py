"""results/quality as tables: perplexity of SmolLM2 with its attention swapped and nothing
trained."""

from __future__ import annotations

from benchmarks.readme.files import Row, read_lines
from benchmarks.readme.regions import markdown_table

FILE, LENGTH, TEXT, SINKS = "quality/full-smollm2-135m.jsonl", 4096, "shakespeare", 4
SHOWN = {  # what a row says, and its label in the file
    "exact": "exact",
    "window of 256": "sliding_window window=256",
    "window of 64": "sliding_window window=64",
    "window of 16": "sliding_window window=16",
    "BigBird, blocks of 64": "bigbird block_size=64",
    "BigBird, blocks of 16": "bigbird block_size=16",
    "XAttention, 8 blocks of 64": "xattention block_size=64 max_blocks=8",
    "XAttention, 4 blocks of 64": "xattention block_size=64 max_blocks=4",
    "`performer`, 256 features": "performer num_features=256",
    "`linear`": "linear",
}


def perplexity() -> str:
    """Perplexity with every layer swapped; beside each window the same with the first tokens seen
    by every row."""
    found = {row["label"]: row["perplexity"] for row in read_lines(FILE) if _is_whole(row)}
    rows = []
    for said, label in SHOWN.items():
        with_sinks = label.replace("sliding_window", "longformer") + f" global_tokens={SINKS}"
        rows.append(
            [said, _digits(found[label]), _digits(found[with_sinks]) if with_sinks in found else ""]
        )
    return markdown_table(
        ["every layer", "perplexity", f"with the first {SINKS} tokens seen by every row"], rows
    )


def mixes() -> str:
    """The cheapest mixes by layer, on text that did not choose them."""
    found: dict[float, dict[int, Row]] = {}
    for row in read_lines(FILE):
        if row["task"] == "mix" and row["text"] == TEXT and row["part"] == "final":
            found.setdefault(row["tolerance"], {})[row["length"]] = row
    lengths = sorted({length for by_length in found.values() for length in by_length})
    headings = [
        "chosen within",
        *(
            f"{what} at {length:,} tokens"
            for length in lengths
            for what in ("perplexity above exact", "MACs saved")
        ),
    ]
    return markdown_table(
        headings,
        [[f"{tolerance:.0%}", *_mix(by, lengths)] for tolerance, by in sorted(found.items())],
    )


TABLES = {"perplexity": perplexity, "mixes": mixes}


def _is_whole(row: Row) -> bool:
    return (
        row["length"] == LENGTH
        and row["text"] == TEXT
        and row["part"] == "final"
        and row["task"] in ("exact", "all")
    )


def _mix(by_length: dict[int, Row], lengths: list[int]) -> list[str]:
    rows = [by_length[length] for length in lengths]
    cells = [
        (
            row["perplexity"] / row["exact_perplexity"] - 1,
            1 - row["attention_macs"] / row["exact_attention_macs"],
        )
        for row in rows
    ]
    return [text for above, saved in cells for text in (f"{above:.1%}", f"{saved:.0%}")]


def _digits(value: float) -> str:
    """Three digits, whole from 100 on."""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"
