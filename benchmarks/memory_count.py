"""The allocator's peaks against `attnzoo.memory`, which computes nothing: a forward without
gradients, and a forward with its backward pass.

    python benchmarks/memory_count.py [--output FILE] [--lengths 1024 4096 ...]
        [--dtype bfloat16 --append]

Two heads of 64, by default float32; peaks are beyond the inputs, and the ratio is the count over
the peak.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

import attnzoo
from attnzoo import Attention
from attnzoo.benchmarking.environment import environment
from attnzoo.benchmarking.peak_memory import peak_bytes
from attnzoo.registry import sized, spec_of

LENGTHS = (1024, 4096, 16384, 65536)
QUADRATIC_LENGTHS = (1024, 4096, 16384)  # where the time is quadratic, so that the study ends
OPTIONS: dict[str, list[dict[str, Any]]] = {  # beside the defaults: what changes what is held
    "sliding_window": [{"dilation": 4}, {"sinks": 4}, {"sinks": 4, "sink_logits": True}],
    "longformer": [{"global_tokens": 2}, {"global_tokens": 2, "dilation": 4}],
    "sparse_transformer": [{"pattern": "fixed"}, {"factors": "by_head"}],
    "nystromformer": [{"convolution": 33}],
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEADS, HEAD_DIM = 2, 64
KINDS = ("forward", "both")
CPU = torch.device("cpu")


def measured(attention: Attention, n: int, is_causal: bool, kind: str, dtype: torch.dtype) -> int:
    """Peak bytes of one kind of run."""
    q, k, v, upstream = (torch.randn(1, HEADS, n, HEAD_DIM, dtype=dtype) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_(kind == "both")

    def run() -> object:
        out = attention(q, k, v, is_causal=is_causal)
        if kind == "both":
            out.backward(upstream)
        return out

    attention.zero_grad()
    with torch.set_grad_enabled(kind == "both"):
        return peak_bytes(run)


def rows(
    name: str, options: dict[str, Any], is_causal: bool, lengths: tuple[int, ...], dtype: str
) -> Iterator[dict[str, Any]]:
    """One for each length."""
    for n in lengths:
        attention = attnzoo.build(
            name, heads=HEADS, head_dim=HEAD_DIM, **options, **sized(name, n)
        ).to(DTYPES[dtype])
        row: dict[str, Any] = {
            "variant": name,
            "options": options,
            "is_causal": is_causal,
            "dtype": dtype,
            "length": n,
        }
        sizes = torch.empty(1, HEADS, n, HEAD_DIM, dtype=DTYPES[dtype], device="meta")
        q, k, v = (sizes.clone() for _ in range(3))
        found = attnzoo.memory(attention, q, k, v, is_causal=is_causal)
        counts = (found.peak_bytes_forward, found.peak_bytes_training)
        for kind, count in zip(KINDS, counts, strict=True):
            peak = measured(attention, n, is_causal, kind, DTYPES[dtype])
            row |= {
                f"{kind}_peak": peak,
                f"{kind}_count": count,
                f"{kind}_ratio": round(count / peak, 4),
            }
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description="Allocator peaks against attnzoo.memory.")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/memory_count.jsonl")
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=None)
    parser.add_argument("--variants", nargs="+", default=None)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--append", action="store_true", help="keep the rows that the file has")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    where = environment(seed=0, device=CPU, dtype=DTYPES[arguments.dtype])
    torch.manual_seed(0)
    print(
        f"{'variant':44}{'form':15}{'length':>8}"
        + "".join(f"{kind + ', MiB':>16}{'ratio':>8}" for kind in KINDS)
    )
    with arguments.output.open("a" if arguments.append else "w") as file:
        for name in arguments.variants or attnzoo.names():
            spec = spec_of(name)
            lengths = tuple(
                arguments.lengths or (QUADRATIC_LENGTHS if "n²" in spec.complexity else LENGTHS)
            )
            for options, is_causal in product([{}, *OPTIONS.get(name, [])], spec.forms):
                shown = " ".join([name, *(f"{key}={value}" for key, value in options.items())])
                for row in rows(name, options, is_causal, lengths, arguments.dtype):
                    file.write(json.dumps({**row, "environment": where}) + "\n")
                    file.flush()
                    cells = "".join(
                        f"{row[f'{kind}_peak'] / 2**20:>16,.1f}{row[f'{kind}_ratio']:>8}"
                        for kind in KINDS
                    )
                    form = "causal" if is_causal else "bidirectional"
                    print(f"{shown:44}{form:15}{row['length']:>8,}{cells}", flush=True)


if __name__ == "__main__":
    main()
