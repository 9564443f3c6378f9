"""Run `attnzoo.conformance.check` over attentions of other libraries, and write what it finds.

    sh benchmarks/conformance/setup.sh FOLDER
    PYTHONPATH=FOLDER python benchmarks/conformance/others.py

A row of the result file is one callable with its report. The page is
docs/results/what_a_check_finds.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.conformance import RULES, check

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/conformance.jsonl"
MODELS = ROOT / "benchmarks/results/conformance_models.jsonl"  # by models.py
PAGE = ROOT / "docs/results/what_a_check_finds.md"
#: Asked of what draws features of its own, which no oracle knows.
WITHOUT_ORACLE = (
    *("causality", "padding", "packing", "hidden rows", "determinism", "batch invariance"),
    *("double use", "odd lengths", "memory growth"),
)


@dataclass(frozen=True)
class Other:
    """A callable of another library.

    package: that has it
    name: of the callable
    make: gives it, with the package imported
    like, dialect, options: as `check` takes them
    note: how it is called, where that is more than its dialect
    """

    package: str
    name: str
    make: Callable[[], Callable[..., Any]]
    like: str | None = None
    dialect: str = "attnzoo"
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def rules_for(other: Other) -> list[str] | None:
    """What is asked: of what is called in this library's dialect, not what this library alone
    promises."""
    if other.like is None:
        return list(WITHOUT_ORACLE)
    if other.dialect != "attnzoo":
        return None
    return [rule.name for rule in RULES if not rule.name.startswith("NaN")]


def of(path: str) -> Any:
    """What MODULE:NAME names."""
    module, name = path.split(":")
    return getattr(import_module(module), name)


def performer() -> Callable[..., Any]:
    """FAVOR+ of performer-pytorch, causal where it is asked to be, with its own directions."""
    made: dict[tuple[int, bool], Any] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False) -> Tensor:
        key = (q.shape[3], is_causal)
        if key not in made:
            torch.manual_seed(0)
            made[key] = of("performer_pytorch:FastAttention")(q.shape[3], 16, causal=is_causal)
        return made[key].to(q.dtype)(q, k, v)

    return attend


def efficient() -> Callable[..., Any]:
    """linear-attention-transformer's two functions."""
    module = "linear_attention_transformer.linear_attention_transformer"

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        is_causal: bool = False,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        if is_causal:
            return of(f"{module}:causal_linear_attn")(q, k, v, key_mask, bucket_size=1)
        return of(f"{module}:linear_attn")(q, k, v, key_mask)

    return attend


def local_window() -> Callable[..., Any]:
    """local-attention, exact window and padded to whole windows."""

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        is_causal: bool = False,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        local = of("local_attention:LocalAttention")(
            window_size=4,
            causal=is_causal,
            look_forward=0 if is_causal else 1,
            autopad=True,
            exact_windowsize=True,
            use_rotary_pos_emb=False,
        )
        return local(q, k, v, mask=key_mask)

    return attend


def x_transformers() -> Callable[..., Any]:
    """Attend of x-transformers."""

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        is_causal: bool = False,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        made = of("x_transformers.attend:Attend")(causal=is_causal, heads=q.shape[1])
        mask = None if key_mask is None else key_mask[:, None, None]
        return made(q, k, v, mask=mask)[0]

    return attend


FLA = "fla.ops"
OTHERS = (
    Other(
        "torch",
        "scaled_dot_product_attention",
        lambda: F.scaled_dot_product_attention,
        "standard",
        "sdpa",
    ),
    Other(
        "transformers",
        "eager_attention_forward",
        lambda: of("transformers.models.llama.modeling_llama:eager_attention_forward"),
        "standard",
        "transformers",
    ),
    Other(
        "fla-core",
        "naive_recurrent_gated_delta_rule",
        lambda: of(f"{FLA}.gated_delta_rule.naive:naive_recurrent_gated_delta_rule"),
        "gated_deltanet",
        "fla",
        {"l2_norm": False},
    ),
    Other(
        "fla-core",
        "naive_chunk_gated_delta_rule",
        lambda: of(f"{FLA}.gated_delta_rule.naive:naive_chunk_gated_delta_rule"),
        "gated_deltanet",
        "fla",
        {"l2_norm": False},
    ),
    Other(
        "fla-core",
        "naive_recurrent_gla",
        lambda: of(f"{FLA}.gla.naive:naive_recurrent_gla"),
        "gla",
        "fla",
    ),
    Other(
        "fla-core",
        "naive_recurrent_kda",
        lambda: of(f"{FLA}.kda.naive:naive_recurrent_kda"),
        "kda",
        "fla",
        {"l2_norm": False},
    ),
    Other(
        "fla-core",
        "naive_recurrent_simple_gla",
        lambda: of(f"{FLA}.simple_gla.naive:naive_recurrent_simple_gla"),
        "mamba2",
        "fla",
        {"scale": None},
    ),
    Other(
        "fla-core",
        "naive_retention",
        lambda: of(f"{FLA}.retention.naive:naive_retention"),
        "retention",
        "fla_head_first",
    ),
    Other(
        "fla-core",
        "delta_rule_recurrence",
        lambda: of(f"{FLA}.delta_rule.naive:delta_rule_recurrence"),
        "deltanet",
        "fla_head_first",
        {"l2_norm": False},
    ),
    Other(
        "fla-core",
        "naive_forgetting_attn",
        lambda: of(f"{FLA}.forgetting_attn.naive:naive_forgetting_attn"),
        "forgetting",
        "fla",
    ),
    Other("performer-pytorch", "FastAttention", performer, note="causal=is_causal, 16 features"),
    Other(
        "linear-attention-transformer",
        "linear_attn, causal_linear_attn",
        efficient,
        note="the second where is_causal, with bucket_size=1",
    ),
    Other(
        "local-attention",
        "LocalAttention",
        local_window,
        "sliding_window",
        options={"window": 5},
        note="window_size=4, exact_windowsize=True, autopad=True",
    ),
    Other("x-transformers", "Attend", x_transformers, "standard"),
)


def main() -> None:
    rows = []
    for other in OTHERS:
        report = check(
            other.make(),
            other.like,
            dialect=other.dialect,
            rules=rules_for(other),
            **other.options,
        )
        print(f"{other.package} {other.name}\n{report}\n", flush=True)
        told = {
            "package": other.package,
            "version": version(other.package).split("+")[0],
            "name": other.name,
            "note": other.note,
            **json.loads(report.to_json()),
        }
        rows.append(told)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_page()


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


if __name__ == "__main__":
    main()
