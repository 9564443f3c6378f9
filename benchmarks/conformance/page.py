"""The page docs/results/what_a_check_finds.md, from the two result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/conformance.jsonl"
MODELS = ROOT / "benchmarks/results/conformance_models.jsonl"  # by models.py
PAGE = ROOT / "docs/results/what_a_check_finds.md"


def write_page() -> None:
    """The page of both result files."""
    both = (RESULTS, MODELS)
    checked, asked = ([json.loads(line) for line in file.open(encoding="utf-8")] for file in both)
    PAGE.write_text(page(checked, asked), encoding="utf-8")


HEAD = """# What a check finds

`attnzoo check` over attentions of other libraries, as PyPI has them, on a CPU.
[Checking](../guides/checking.md) says what each rule asks; one that a callable has no argument
for is left out. `benchmarks/conformance/others.py` writes this page from what the
rules measured. A convention that is not this library's own shows as a failure, too. What no single
call shows is [at the end](#in-layers-and-models).

| callable | checked against | hold | fail |
|---|---|---|---|
"""


MODELS_HEAD = """
## In layers and models

What whole layers and small models with random weights answered to a question, by
`benchmarks/conformance/models.py`. An error is the norm of the difference over that of the rows.
"""


def page(rows: list[dict[str, Any]], asked: list[dict[str, Any]]) -> str:
    """What was found, in the words of the rules, and what was answered."""
    lines, parts = [], []
    for row in rows:
        found = row["findings"]
        failing = [one for one in found if one["status"] == "fails"]
        holding = sum(one["status"] == "holds" for one in found)
        title = f"{row['package']} {row['version']}: `{row['name']}`"
        against = f"`{row['like']}`" if row["like"] else "rules alone"
        lines.append(f"| {title} | {against} | {holding} | {len(failing)} |")
        if failing:
            parts.append(f"\n## {title}\n")
            called = f"Called as `{row['dialect']}`" + (f", {row['note']}." if row["note"] else ".")
            parts.append(called + "\n")
            for one in failing:
                parts.append(
                    f"- **{one['rule']}**: {one['found']} (smallest call: {one['trial']})."
                )
    answers = [
        f"- {one['package']} {one['version']}, `{one['name']}`, {one['asked']}: {one['answer']}."
        for one in asked
    ]
    found = [*lines, *parts, MODELS_HEAD, *answers]
    return HEAD + "\n".join(found) + "\n"
