"""Softmax with other rows against exact attention: causal, 8 heads of 64, forward and forward with
backward, float32, CPU.

    OMP_PROC_BIND=true python -m benchmarks.softmax_rows [--output FILE] [--rounds N]

A contender, torch's causal SDPA and its SDPA under a dense mask take turns; each ratio is the
median over the rounds of one round's ratio, with its quartiles: 2 is twice the time of SDPA. The
gates of `forgetting` and `path` are log_sigmoid(x + open), x normal: at 0 half of a key is left
after a token, at 6 all but 0.4%. Rows are compared with the reference in the same run.
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
from attnzoo.benchmarking.environment import environment
from attnzoo.benchmarking.timing import Timing, disagreement, interleave
from benchmarks.selected import exact, passes, quotients

HEADS, HEAD_DIM, LENGTHS, ROUNDS, CHECKED = 8, 64, (2048, 4096), 7, 64
CONTENDERS: list[tuple[str, float | None]] = [
    ("forgetting", 0.0),
    ("forgetting", 3.0),
    ("forgetting", 6.0),
    ("sigmoid", None),
    ("differential", None),
    ("differential_v2", None),
    ("path", 3.0),
]


def gates(name: str, opened: float | None, length: int) -> dict[str, Tensor]:
    """What a call of the variant brings besides."""
    found: dict[str, Tensor] = {}
    if opened is not None:
        found["log_decay"] = F.logsigmoid(torch.randn(1, HEADS, length) + opened)
    if name == "path":
        found["removal_key"] = F.normalize(torch.randn(1, HEADS, length, HEAD_DIM), dim=-1)
        found["beta"] = torch.rand(1, HEADS, length)
    return found


def rows(name: str, opened: float | None, length: int, rounds: int) -> Iterator[dict[str, Any]]:
    """One for each phase."""
    attention = attnzoo.build(name, heads=HEADS, head_dim=HEAD_DIM)
    inputs = [torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3)]
    own = gates(name, opened, length)
    mask = torch.ones(length, length).tril().log()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, is_causal=True, **own)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    for learns in (False, True):
        contenders: dict[str, Callable[..., Tensor]] = {
            "exact": exact,
            "masked": masked,
            "variant": attend,
        }
        timings: dict[str, Timing] = interleave(
            {who: passes(function, inputs, learns) for who, function in contenders.items()},
            rounds=rounds,
        )
        over = {who: quotients(timings["variant"], timings[who]) for who in ("exact", "masked")}
        with torch.no_grad():
            last = attend(*inputs)[:, :, -CHECKED:]
            a = attention.weights(inputs[0][:, :, -CHECKED:], inputs[1], is_causal=True, **own)
        yield {
            "variant": name,
            "opened": opened,
            "n": length,
            "phase": "forward+backward" if learns else "forward",
            "mistake": disagreement(last, a @ inputs[2].detach()),
            "seconds": {who: timing.median for who, timing in timings.items()},
            "over": over,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/softmax_rows.jsonl")
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    where = environment(seed=0, device=torch.device("cpu"), dtype=torch.float32)
    print(f"{'contender':22}{'n':>6} {'phase':18}{'x SDPA':>20}{'x SDPA with a mask':>22}  rows")
    with arguments.output.open("w") as file:
        for length in LENGTHS:
            for name, opened in CONTENDERS:
                for row in rows(name, opened, length, arguments.rounds):
                    file.write(json.dumps({**row, "environment": where}) + "\n")
                    file.flush()
                    label = name if opened is None else f"{name} open={opened:g}"
                    said = [
                        f"{middle:.2f} ({low:.2f}-{high:.2f})"
                        for middle, (low, high) in row["over"].values()
                    ]
                    print(
                        f"{label:22}{length:6} {row['phase']:18}{said[0]:>20}{said[1]:>22}  "
                        f"{row['mistake'] or 'right'}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
