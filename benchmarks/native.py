"""The backend `native`, compiled tiles, beside `tiles` and exact attention; 12 heads of 64,
float32, CPU.

    OMP_PROC_BIND=true python -m benchmarks.native [--output FILE] [--rounds N] [VARIANT ...]

All contenders take turns; a ratio is the median over the rounds of one round's ratio, with its
quartiles. `gain` is the time of `tiles` over that of `native`, `over_exact` the time of `native`
over SDPA's, and `kept` the share of the MACs' speed-up that the clock shows, where causal SDPA
counts for its visible half. Rows are compared with the reference, and gradients with those of
`tiles`, in the same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attnzoo
from attnzoo.attention import Attention
from attnzoo.benchmarking.environment import environment
from attnzoo.benchmarking.timing import disagreement, interleave
from benchmarks.selected import passes, quotients
from benchmarks.short_inputs import HEAD_DIM, HEADS, SPARSE, mistake

VARIANTS = ("sliding_window", "sliding_window, sinks", "bigbird", "longformer")
LENGTHS, ROUNDS, BUDGET = (128, 256, 512, 1024, 4096, 16384), 9, 4.0


def rows(
    label: str, options: dict[str, Any], length: int, is_causal: bool, rounds: int
) -> Iterator[dict[str, Any]]:
    """One for each phase."""
    name = label.split(",")[0]
    inputs = [torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3)]

    def build(backend: str) -> Attention:
        return attnzoo.build(name, heads=HEADS, head_dim=HEAD_DIM, backend=backend, **options)

    def calling(attention: Attention) -> Callable[..., Tensor]:
        return lambda q, k, v: attention(q, k, v, is_causal=is_causal)

    attentions = {backend: build(backend) for backend in ("native", "tiles")}
    ways = {backend: calling(attention) for backend, attention in attentions.items()}
    ways["exact"] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    wrong = _mistake(attentions["native"], ways, inputs, is_causal)
    cost = attentions["native"].cost(1, length, is_causal=is_causal)
    exact_cost = attnzoo.build("standard", heads=HEADS, head_dim=HEAD_DIM).cost(
        1, length, is_causal=is_causal
    )
    promised = exact_cost.kernel_macs / cost.macs
    for learns in (False, True):
        timings = interleave(
            {key: passes(way, inputs, learns) for key, way in ways.items()},
            rounds=rounds if length > 512 else 3 * rounds,
            warmups=2,
            budget=BUDGET,
        )
        exact, native = timings["exact"], timings["native"]
        speedup, spread = quotients(exact, native)
        yield {
            "variant": label,
            "options": options,
            "length": length,
            "is_causal": is_causal,
            "phase": "forward+backward" if learns else "forward",
            "mistake": wrong,
            "seconds": {key: timing.median for key, timing in timings.items()},
            "gain": quotients(timings["tiles"], native),
            "over_exact": quotients(native, exact),
            "kept": (speedup / promised, [one / promised for one in spread]),
        }


def _mistake(
    attention: Attention,
    ways: dict[str, Callable[..., Tensor]],
    inputs: list[Tensor],
    is_causal: bool,
) -> str | None:
    """What is wrong with rows of `native` beside the reference, or gradients beside `tiles`."""
    found = {name: ways[name](*inputs) for name in ("native", "tiles")}
    sent = torch.randn_like(found["native"])
    gradients = [torch.autograd.grad(out, inputs, sent) for out in found.values()]
    reasons = (disagreement(*pair) for pair in zip(*gradients, strict=True))
    if len(inputs[0][0, 0]) > 4096:  # the reference lays out all scores
        return next(filter(None, (disagreement(*found.values()), *reasons)), None)
    of_rows = mistake(attention, inputs, {"is_causal": is_causal}, found["native"])
    return next(filter(None, (of_rows, *reasons)), None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="*", help="labels, as printed; all by default")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/native.jsonl"))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    where = environment(seed=0, device=torch.device("cpu"), dtype=torch.float32)
    with arguments.output.open("w") as file:
        for label in arguments.variants or VARIANTS:
            for length in arguments.lengths:
                for is_causal in (False, True):
                    for row in rows(label, SPARSE[label], length, is_causal, arguments.rounds):
                        file.write(json.dumps({**row, "environment": where}) + "\n")
                        file.flush()
                        print(line(row), flush=True)


def line(row: dict[str, Any]) -> str:
    said = " ".join(
        f"{key} {row[key][0]:5.2f} ({row[key][1][0]:.2f}-{row[key][1][1]:.2f})"
        for key in ("gain", "over_exact", "kept")
    )
    return (
        f"{row['variant']:22} {row['length']:6} {'causal' if row['is_causal'] else '      '} "
        f"{row['phase'][-8:]:8} {said}  {row['mistake'] or 'right'}"
    )


if __name__ == "__main__":
    main()
