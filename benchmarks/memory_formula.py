"""The allocator's peaks against the closed forms of `Attention.cost`: a forward without gradients,
one that records, and both passes.

    python benchmarks/memory_formula.py [--output FILE] [--lengths 1024 4096 ...] [--device cpu]
        [--dtype bfloat16 --append]

Two heads of 64, by default float32; peaks are beyond the inputs, and the ratio is peak over
formula. forward: `Cost.forward_bytes`. recording: the larger of that and of what autograd holds
after the forward, `Cost.kept_bytes`, without q, k and v and with the output. both:
`Cost.training_bytes`.

On a GPU (--device cuda) the peaks are those of torch's caching allocator. The formulas are of the
CPU's kernels, so the ratios say how far they carry; this has not run on a GPU.
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
from attnzoo.bench.environment import environment
from attnzoo.bench.peak_memory import peak_bytes
from attnzoo.engines.engine import Cost
from attnzoo.registry import sized, spec_of
from attnzoo.variants.sparse_transformer.factorized import Factorized

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
KINDS = ("forward", "recording", "both")


def measured(
    attention: Attention,
    n: int,
    is_causal: bool,
    kind: str,
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """Peak bytes of one kind of run."""
    q, k, v = (
        torch.randn(
            1, HEADS, n, HEAD_DIM, device=device, dtype=dtype, requires_grad=kind != "forward"
        )
        for _ in range(3)
    )
    upstream = torch.randn(1, HEADS, n, HEAD_DIM, device=device, dtype=dtype)

    def run() -> object:
        out = attention(q, k, v, is_causal=is_causal)
        if kind == "both":
            out.backward(upstream)
        return out

    attention.zero_grad()
    with torch.set_grad_enabled(kind != "forward"):
        return peak_bytes(run, device)


def formulas(attention: Attention, cost: Cost, n: int, dtype: torch.dtype) -> dict[str, int | None]:
    """Bytes of each kind by the closed forms; None where there is none."""
    recording = None
    if cost.kept_bytes is not None and cost.forward_bytes is not None:
        tensor = HEADS * n * HEAD_DIM * dtype.itemsize
        # The others keep the very output that they return.
        returns = attention.spec.family == "sparse" and not isinstance(attention.engine, Factorized)
        held = cost.kept_bytes - 3 * tensor + (tensor if returns else 0)
        recording = max(cost.forward_bytes, held)
    return {"forward": cost.forward_bytes, "recording": recording, "both": cost.training_bytes}


def rows(
    name: str,
    options: dict[str, Any],
    is_causal: bool,
    lengths: tuple[int, ...],
    device: torch.device,
    dtype: str,
) -> Iterator[dict[str, Any]]:
    """One for each length."""
    for n in lengths:
        attention = attnzoo.build(
            name, heads=HEADS, head_dim=HEAD_DIM, **options, **sized(name, n)
        ).to(device, DTYPES[dtype])
        row: dict[str, Any] = {
            "variant": name,
            "options": options,
            "is_causal": is_causal,
            "dtype": dtype,
            "length": n,
        }
        cost = attention.cost(1, n, is_causal=is_causal, dtype=DTYPES[dtype])
        for kind, formula in formulas(attention, cost, n, DTYPES[dtype]).items():
            peak = measured(attention, n, is_causal, kind, device, DTYPES[dtype])
            row |= {
                f"{kind}_peak": peak,
                f"{kind}_formula": formula,
                f"{kind}_ratio": None if formula is None else round(peak / formula, 4),
            }
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description="Allocator peaks against the closed forms.")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/memory_formula.jsonl")
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=None)
    parser.add_argument("--variants", nargs="+", default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--append", action="store_true", help="keep the rows that the file has")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device)
    where = environment(seed=0, device=device, dtype=DTYPES[arguments.dtype])
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
                for row in rows(name, options, is_causal, lengths, device, arguments.dtype):
                    file.write(json.dumps({**row, "environment": where}) + "\n")
                    file.flush()
                    cells = "".join(
                        f"{row[f'{kind}_peak'] / 2**20:>16,.1f}{row[f'{kind}_ratio'] or '–':>8}"
                        for kind in KINDS
                    )
                    print(
                        f"{shown:44}{'causal' if is_causal else 'bidirectional':15}"
                        f"{row['length']:>8,}{cells}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
