"""Which attention should I use: the measured numbers behind each answer of docs/choosing.md."""

from __future__ import annotations

import json
from typing import Any

from attnzoo.report.training.train_tables import full_title
from attnzoo.results.result_file import read_rows
from attnzoo.training.summary import summed_up
from attnzoo.training.training_rows import Row as TrainingRow
from benchmarks.readme import files
from benchmarks.readme.files import Row, read_lines
from benchmarks.readme.regions import markdown_table

SMOLLM = "quality/full-smollm2-135m.jsonl"
MINILM = "quality/full-minilm-l6.jsonl"


def encoders() -> str:
    """MiniLM at 512 tokens: error and speed of what saves multiply-accumulates."""
    rows = [row for row in compared("MiniLM-L6", 512) if row["output_error"] is not None]
    better = [row for row in rows if row["output_error"] < row["mean_value_error"]]
    shown = sorted(better, key=lambda row: row["output_error"])
    return markdown_table(
        ["attention", "output error", "MAC speed-up", "measured speed-up"],
        [
            [
                f"`{row['variant']}`",
                f"{row['output_error']:.3f}",
                f"{row['promised_speedup']:.2f}×",
                f"{row['speedup']:.2f}×",
            ]
            for row in shown
        ],
    )


def documents() -> str:
    """MiniLM's embeddings with every layer swapped, where a tenth is saved, the nearest first."""
    rows = [row for row in read_lines(MINILM) if (row["task"], row["part"]) == ("all", "final")]
    rows = [
        row
        for row in rows
        if row["cosine"] is not None and row["length"] == 256 and macs_saved(row) >= 0.1
    ]
    best = sorted(rows, key=lambda row: -row["cosine"])[:6]
    return markdown_table(
        ["every layer", "cosine to exact", "same nearest passage", "attention's MACs saved"],
        [
            [
                f"`{row['label']}`",
                f"{row['cosine']:.2f}",
                f"{row['top1']:.0%}",
                f"{macs_saved(row):.0%}",
            ]
            for row in best
        ],
    )


def decoders() -> str:
    """SmolLM2 untrained at 4,096 tokens beside the time of a token at 32,768."""
    labels = {
        "exact": "standard",
        "longformer window=256 global_tokens=4": "sliding_window",
        "bigbird block_size=64": None,
        "sliding_window window=256": "sliding_window",
        "linear": "linear",
        "performer num_features=256": "performer",
    }
    rows = []
    for label, generator in labels.items():
        found = swapped(label)
        rows.append(
            [
                f"`{label}`",
                *(f"{found[text]['perplexity']:,.1f}" for text in ("shakespeare", "prose")),
                f"{macs_saved(found['shakespeare']):.0%}",
                "" if generator is None else f"{token_time(generator) * 1e3:.0f} ms",
            ]
        )
    headings = ["every layer", "perplexity, Shakespeare", "prose", "MACs saved"]
    return markdown_table([*headings, "a token after 32,768"], rows)


def trained(file: str) -> str:
    """Scores of one study of training, with the state of decoding."""
    problems = summed_up(read_rows(files.RESULTS / "tasks" / f"{file}.jsonl", TrainingRow))
    rows = []
    for problem in problems:
        told = full_title(problem, problems) if len(problems) > 1 else problem.task
        for one in problem.contenders:
            if one.test is None or one.is_baseline:
                continue
            score = f"{one.test:.1%}" if problem.metric == "accuracy" else f"{one.test:.3f}"
            state = "" if one.state_bytes is None else f"{one.state_bytes / 1024:.1f} KiB"
            rows.append([told, f"`{one.label}`", score, str(one.seeds), state])
    return markdown_table(["task", "attention", problems[0].metric, "seeds", "state"], rows)


def speeds(model: str, length: str) -> str:
    """What of the MAC speed-up a CPU gives, fastest first."""
    rows = [row for row in compared(model, int(length)) if row["speedup"]]
    fastest = sorted(rows, key=lambda row: -row["speedup"])
    return markdown_table(
        ["attention", "measured speed-up", "MAC speed-up", "output error", "baseline"],
        [
            [
                f"`{row['variant']}`",
                f"{row['speedup']:.2f}×",
                f"{row['promised_speedup']:.2f}×",
                f"{row['output_error']:.3f}",
                f"{row['mean_value_error']:.3f}",
            ]
            for row in fastest
        ],
    )


def compared(model: str, length: int) -> list[Row]:
    """The rows of the comparison with exact attention, of one model."""
    rows = json.loads((files.RESULTS / "compare.json").read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if row["model"] == model and row["length"] == length]


def swapped(label: str) -> dict[str, Row]:
    """The rows of 4,096 tokens, by their text."""
    found = {
        row["text"]: row
        for row in read_lines(SMOLLM)
        if row["label"] == label and (row["part"], row["length"]) == ("final", 4096)
    }
    if not found:
        raise ValueError(f"{SMOLLM} has no row of {label!r}")
    return found


def macs_saved(row: Row) -> float:
    """Which part of the attentions' MACs a mix saves."""
    return 1 - row["attention_macs"] / row["exact_attention_macs"]


def token_time(contender: str) -> float:
    """Seconds of a token after 32,768, the better of the passes, in SmolLM2-135M's shape."""
    return min(
        row["median_seconds"]
        for row in read_lines("generation.jsonl")
        if (row["contender"], row["length"]) == (contender, 32768)
    )


TABLES: dict[str, Any] = {
    "encoders": encoders,
    "documents": documents,
    "decoders": decoders,
    "trained": trained,
    "speeds": speeds,
}
