"""Packed rows against the same pieces as samples of a batch: 16 pieces of 256 tokens in a row of
4,096, 8 heads of 64, forward and forward with backward, float32.

    OMP_PROC_BIND=true python benchmarks/packing.py [--output FILE] [--variants standard ...]

`packed` is a row with `segments`, `batch` the pieces as 16 samples, `dense`, for exact attention,
SDPA over the whole row with a block-diagonal mask. Times are taken in turns; a ratio is the median
over the rounds of one round's ratio, with its quartiles. The rows of `packed` are compared with
those of `batch` in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attnzoo
from attnzoo.benchmarking.environment import environment
from attnzoo.benchmarking.timing import Timing, interleave
from attnzoo.registry import sized, spec_of

PIECES, LENGTH, HEADS, HEAD_DIM = 16, 256, 8, 64
ROUNDS = 7
PHASES = ("forward", "forward+backward")


def passes(attend: Callable[..., Tensor], inputs: list[Tensor], learns: bool) -> Callable[[], None]:
    """One pass, whose gradients are thrown away."""

    def run() -> None:
        with torch.set_grad_enabled(learns):
            out = attend(*inputs)
        if learns:
            torch.autograd.grad(out, inputs, torch.ones_like(out))

    return run


def ratio(of: Timing, to: Timing) -> dict[str, Any]:
    """The median of the rounds' ratios and its quartiles."""
    each = [a / b for a, b in zip(of.seconds, to.seconds, strict=True)]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return {"ratio": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


def rows(name: str) -> Iterator[dict[str, Any]]:
    """One for each form and phase of a variant."""
    length = PIECES * LENGTH
    attention = attnzoo.build(name, heads=HEADS, head_dim=HEAD_DIM, **sized(name, length))
    segments = torch.arange(PIECES).repeat_interleave(LENGTH)[None]
    block_diagonal = segments[0, :, None] == segments
    for is_causal in spec_of(name).forms:
        mask = block_diagonal.tril() if is_causal else block_diagonal
        row = [torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3)]
        batch = [
            x.detach()[0].unflatten(1, (PIECES, -1)).transpose(0, 1).contiguous().requires_grad_()
            for x in row
        ]

        def alone(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = is_causal) -> Tensor:
            return attention(q, k, v, is_causal=is_causal)

        def packed(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = is_causal) -> Tensor:
            return attention(q, k, v, is_causal=is_causal, segments=segments)

        def dense(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor = mask) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        with torch.no_grad():
            wanted = alone(*batch).transpose(0, 1).flatten(1, 2)[None]
            error = (packed(*row) - wanted).abs().max().item()
        for phase in PHASES:
            learns = phase != "forward"
            contenders = {
                "batch": passes(alone, batch, learns),
                "packed": passes(packed, row, learns),
            }
            if name == "standard":
                contenders["dense"] = passes(dense, row, learns)
            timings = interleave(contenders, rounds=ROUNDS)
            found: dict[str, Any] = {
                "variant": name,
                "is_causal": is_causal,
                "phase": phase,
                "ran": attention.last_backend,
                "largest_error": error,
                "seconds": {who: timing.median for who, timing in timings.items()},
                "packed_to_batch": ratio(timings["packed"], timings["batch"]),
            }
            if "dense" in timings:
                found["dense_to_packed"] = ratio(timings["dense"], timings["packed"])
            yield found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/packing.jsonl"))
    parser.add_argument("--variants", nargs="+", default=attnzoo.names())
    arguments = parser.parse_args()
    torch.manual_seed(0)
    where = environment(seed=0, device=torch.device("cpu"), dtype=torch.float32)
    print(f"{'variant':20}{'form':15}{'phase':18}{'batch':>9}{'packed':>9}  packed to batch")
    with arguments.output.open("w") as file:
        for name in arguments.variants:
            for row in rows(name):
                file.write(json.dumps({**row, "environment": where}) + "\n")
                file.flush()
                seconds, found = row["seconds"], row["packed_to_batch"]
                low, high = found["quartiles"]
                form = "causal" if row["is_causal"] else "bidirectional"
                dense = row.get("dense_to_packed")
                print(
                    f"{row['variant']:20}{form:15}{row['phase']:18}"
                    f"{seconds['batch'] * 1e3:7.1f}ms{seconds['packed'] * 1e3:7.1f}ms  "
                    f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"
                    + (f"   dense mask {dense['ratio']:.1f} × packed" if dense else ""),
                    flush=True,
                )


if __name__ == "__main__":
    main()
