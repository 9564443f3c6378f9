"""What the result files and the page of the papers' claims say of one variant."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from attnzoo.report.training.train_tables import full_title
from attnzoo.results.result_file import read_rows
from attnzoo.results.units import count, memory
from attnzoo.training.summary import Problem, summed_up
from attnzoo.training.training_rows import Row as TrainingRow
from benchmarks.readme.files import RESULTS, Row, read_lines
from benchmarks.readme.regions import markdown_table

CLAIMS = Path(__file__).parent / "results" / "papers.md"
QUALITY = (
    ("quality/full-smollm2-135m.jsonl", "shakespeare", 4096, "perplexity", "exact_perplexity"),
)
PHASES = ("forward", "forward+backward")


def measured(name: str) -> Iterator[str]:
    """Sections of results: on real queries and keys, in a pretrained model, trained, timed."""
    parts = [*_compared(name), *_swapped(name), *_healed(name), *_trained(name)]
    parts += _timed(name)
    if parts:
        yield "## Results here"
        yield from parts


def claims(name: str) -> Iterator[str]:
    """The rows of the claims that were rerun for this variant's paper."""
    lines = CLAIMS.read_text(encoding="utf-8").splitlines()
    found: list[str] = []
    within = False
    for line in lines:
        if study := re.match(r"\| \[`(\w+)`\]", line):
            within = study[1].startswith(f"{name}_")
        elif not line.startswith("| |"):
            within = False
        if within:
            found.append(line)
    if found:
        head = next(line for line in lines if line.startswith("| study "))
        yield "## The paper's claims, rerun"
        yield "[What the papers claim, rerun](../results/papers.md) has the figures."
        yield "\n".join([head, re.sub(r"[^|]+", "---", head), *found])


def _compared(name: str) -> Iterator[str]:
    rows = json.loads((RESULTS / "compare.json").read_text(encoding="utf-8"))["rows"]
    found = [row for row in rows if row["variant"] == name and row["output_error"] is not None]
    if not found:
        return
    yield (
        "On queries and keys of pretrained models, untrained, at the default options "
        "([all variants](../results/comparison.md)). The baseline answers the average of the "
        "values."
    )
    cells = [
        [
            row["model"],
            f"{row['length']:,}",
            f"{row['output_error']:.3f}",
            f"{row['mean_value_error']:.3f}",
            f"{row['top_mass_kept']:.0%}",
            count(row["macs"]),
            f"{row['speedup']:.2f}×" if row["speedup"] else "",
            memory(row["peak_bytes"]),
        ]
        for row in found
        if row["speedup"]
    ]
    headings = ["model", "tokens", "output error", "baseline", "top-16 mass kept", "MACs"]
    yield markdown_table([*headings, "measured speed-up", "peak memory"], cells)


def _swapped(name: str) -> Iterator[str]:
    for file, text, length, score, exact in QUALITY:
        rows = [
            row
            for row in read_lines(file)
            if (row["task"], row["part"], row["text"], row["length"])
            == ("all", "final", text, length)
            and row["label"].split()[0] == name
            and row[score] is not None
        ]
        if rows:
            yield (
                f"In all 30 layers of SmolLM2-135M, nothing trained, {length:,} tokens of "
                f"Shakespeare; exact attention has a perplexity of {rows[0][exact]:.1f} "
                "([more](../results/swapped.md)):"
            )
            yield markdown_table(
                ["options", "perplexity", "attention's MACs, of exact"],
                [
                    [
                        f"`{row['label']}`",
                        f"{row[score]:,.1f}",
                        f"{row['attention_macs'] / row['exact_attention_macs']:.0%}",
                    ]
                    for row in rows
                ],
            )


def _healed(name: str) -> Iterator[str]:
    for run in read_lines("heal.jsonl"):
        recipe = run["recipe"]
        if recipe["variant"] != name:
            continue
        first, last = (run["evaluations"][end]["perplexity"] for end in (0, -1))
        told = ", ".join(
            f"{text} {first[text]:,.0f} to {last[text]:,.1f} (exact {run['exact'][text]:.1f})"
            for text in first
        )
        yield (
            "In SmolLM2-135M, healed by 160 steps of 256 tokens "
            f"([healing](../results/healing.md)), perplexity went from that of the swap: {told}."
        )


def _trained(name: str) -> Iterator[str]:
    cells = []
    for path, problems in _studies().items():
        for problem in problems:
            for one in problem.contenders:
                if one.test is None or one.label.split(" ")[0] != name or "+" in one.label:
                    continue
                percent = problem.metric == "accuracy"
                score = f"{one.test:.1%}" if percent else f"{one.test:.3f} bits"
                state = "" if one.state_bytes is None else memory(one.state_bytes)
                problem_title = full_title(problem, problems)
                cells.append(
                    [f"`{path.stem}`", problem_title, f"`{one.label}`", score, str(one.seeds)]
                )
                cells[-1].append(state)
    if cells:
        yield (
            "Trained from scratch ([which attention learns what](../results/tasks.md)): accuracy, "
            "or bits per character, on held-out data."
        )
        yield markdown_table(["study", "problem", "options", "score", "seeds", "state"], cells)


@cache
def _studies() -> dict[Path, list[Problem]]:
    """Every study of training, by its file."""
    paths = sorted((RESULTS / "tasks").glob("*.jsonl"))
    return {path: summed_up(read_rows(path, TrainingRow)) for path in paths}


def _timed(name: str) -> Iterator[str]:
    found: dict[str, Row] = {
        row["phase"]: row
        for row in read_lines("gates.jsonl")
        if row["variant"] == name and row["length"] == 4096 and row["segments"] == 1
    }
    if all(phase in found for phase in PHASES):
        said = " and ".join(
            f"{found[phase]['sdpa_seconds'] / found[phase]['seconds']:.2f} times as fast "
            f"{'forward' if phase == 'forward' else 'with the backward pass'}"
            for phase in PHASES
        )
        yield (
            "Beside exact attention by SDPA, 4,096 tokens, causal, 8 heads of 64, on a CPU: "
            f"{said} ([all of them](../results/gates.md))."
        )
