"""The five attentions at the top of the README: what is left of a model, what was learned, and what
they cost, each from the result file that measured it."""

from __future__ import annotations

from dataclasses import dataclass

from attnzoo.registry import build
from attnzoo.results.result_file import read_rows
from attnzoo.results.units import memory
from attnzoo.training.summary import summed_up
from attnzoo.training.training_rows import Row as TrainingRow
from benchmarks.readme import files
from benchmarks.readme.files import Row, read_lines
from benchmarks.readme.regions import markdown_table

HEADS, HEAD_DIM, LENGTH, LONG = 8, 64, 4096, 32768


@dataclass(frozen=True)
class Useful:
    """A row of the table: its options here, and what it is called in each result file.

    swapped: in quality/full-smollm2-135m.jsonl, where every layer was swapped and nothing trained
    healed: in heal.jsonl
    trained: in tasks/mqar-gates.jsonl
    """

    said: str
    variant: str
    options: dict[str, int]
    swapped: str | None = None
    healed: str | None = None
    trained: str | None = None


ROWS = (
    Useful("exact: `standard`", "standard", {}, "exact", "exact", "standard"),
    Useful(
        "`sliding_window`, 256 keys, 4 sinks",
        "sliding_window",
        {"window": 256, "sinks": 4},
        "longformer window=256 global_tokens=4",
    ),
    Useful("`bigbird`, blocks of 64", "bigbird", {}, "bigbird block_size=64"),
    Useful("`linear`", "linear", {}, "linear", "linear", "linear"),
    Useful(
        "`gated_deltanet`",
        "gated_deltanet",
        {},
        None,
        "gated_deltanet",
        "gated_deltanet scale=1.0",
    ),
)
HEADINGS = [
    "attention",
    "perplexity, swapped",
    "healed",
    "recall, trained",
    f"MACs at {LENGTH:,}",
    "measured speed",
    f"state at {LONG:,}",
]


def useful() -> str:
    """The table."""
    return markdown_table(HEADINGS, [_cells(row) for row in ROWS])


TABLES = {"useful": useful}


def _cells(row: Useful) -> list[str]:
    exact = build("standard", HEADS, HEAD_DIM).cost(1, LENGTH, is_causal=True)
    attention = build(row.variant, HEADS, HEAD_DIM, **row.options)
    macs = attention.cost(1, LENGTH, is_causal=True).macs
    return [
        row.said,
        _swapped(row.swapped) if row.swapped else "",
        _healed(row.healed) if row.healed else "",
        _trained(row.trained) if row.trained else "",
        f"{macs / exact.support_macs:.0%}" if row.variant != "standard" else "100%",
        _speed(row),
        memory(attention.cost(1, LONG, is_causal=True).state_bytes),
    ]


def _swapped(label: str) -> str:
    """Perplexity of 4,096 tokens of Shakespeare, SmolLM2-135M."""
    found = next(
        row["perplexity"]
        for row in read_lines("quality/full-smollm2-135m.jsonl")
        if row["label"] == label
        and (row["text"], row["part"], row["length"]) == ("shakespeare", "final", LENGTH)
    )
    return _digits(found)


def _healed(variant: str) -> str:
    """Perplexity of Hamlet after matching and distilling."""
    runs = read_lines("heal.jsonl")
    if variant == "exact":
        return _digits(runs[0]["exact"]["Hamlet"])
    run = next(run for run in runs if run["recipe"]["variant"] == variant)
    return _digits(run["evaluations"][-1]["perplexity"]["Hamlet"])


def _trained(label: str) -> str:
    """Accuracy of recall, models trained from scratch with one attention in every layer."""
    (problem,) = summed_up(read_rows(files.RESULTS / "tasks" / "mqar-gates.jsonl", TrainingRow))
    return next(f"{one.test:.0%}" for one in problem.contenders if one.label == label)


def _speed(row: Useful) -> str:
    """The time of SDPA over its own, in one run: causal, 4,096 tokens, float32, two threads."""
    found: Row = next(
        one
        for one in read_lines("five.jsonl")
        if (one["variant"], one["options"], one["length"]) == (row.variant, row.options, LENGTH)
    )
    return f"{found['sdpa_seconds'] / found['seconds']:.1f}×"


def _digits(value: float) -> str:
    """Three digits, whole from 100 on."""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"
