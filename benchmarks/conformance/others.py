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
from functools import partial
from importlib.metadata import version
from typing import Any

import torch.nn.functional as F
from adapters import (
    FEATURES,
    bert_layer,
    efficient,
    llama_layer,
    local_window,
    of,
    performer,
    performer_without_eps,
    x_transformers,
)
from page import RESULTS, write_page

from attnzoo.conformance import RULES, check

#: Asked of what no oracle knows.
WITHOUT_ORACLE = (
    *("causality", "alignment", "padding", "packing", "hidden rows", "determinism"),
    *("batch invariance", "double use", "odd lengths", "memory growth"),
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
    Other("transformers", "LlamaAttention", llama_layer, "standard", "transformers_layer"),
    Other("transformers", "BertSelfAttention", bert_layer, "standard", "transformers_layer"),
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
    Other(
        "performer-pytorch",
        "FastAttention",
        performer,
        "performer",
        options={"num_features": FEATURES},
        note="causal=is_causal, with the directions that the variant draws",
    ),
    Other(
        "performer-pytorch",
        "softmax_kernel, linear_attention",
        performer_without_eps,
        "performer",
        options={"num_features": FEATURES},
        note="as FastAttention without a mask does, but with eps=0",
    ),
    Other(
        "linear-attention-transformer",
        "linear_attn, causal_linear_attn",
        partial(efficient, 1),
        note="the second where is_causal, with bucket_size=1",
    ),
    Other(
        "linear-attention-transformer",
        "causal_linear_attn",
        partial(efficient, 64),
        note="with its default bucket_size=64, padded to whole buckets",
    ),
    Other(
        "local-attention",
        "LocalAttention",
        local_window,
        "sliding_window",
        options={"window": 5},
        note="window_size=4, exact_windowsize=True, autopad=True",
    ),
    Other("x-transformers", "Attend", partial(x_transformers, False), "standard"),
    Other(
        "x-transformers",
        "Attend, flash=True",
        partial(x_transformers, True),
        "standard",
    ),
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


if __name__ == "__main__":
    main()
