"""What it costs on a GPU to keep a NaN in a later token from earlier rows: the shield alone, the
rows made NaN, and exact causal attention around them beside SDPA; replayed as CUDA graphs, with the
passes over memory that each needs.

    python benchmarks/cuda/shielding.py > shielding.jsonl
    python benchmarks/cuda/shielding.py --device cpu     # without times, to see that it runs

A NaN and an inf are put in afterwards: `right` says that no earlier row has met them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import attnzoo
from attnzoo.benchmarking.cuda_timing import captured, stopwatch_of
from attnzoo.benchmarking.timing import interleave
from attnzoo.call import Call
from attnzoo.sequences import bad_slots
from attnzoo.sequences.bad_slots import poison, shield_past

BATCH, HEADS, HEAD_DIM = 8, 16, 64
LENGTHS = (1024, 4096)
ROUNDS = 25
#: Tensors as large as k that are read and written: of the shield, k and v are read to find what is
#: bad, then read and written without it; the rows of the output are read and written.
PASSES = {"shield": 6, "poison": 2, "standard": 12, "sdpa": 4}


def contenders(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name."""
    attention = attnzoo.build("standard", heads=HEADS, head_dim=HEAD_DIM).to(q.device, q.dtype)
    rows = torch.zeros(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)

    def shield() -> Tensor:
        return shield_past(Call(q, k, v, is_causal=True))[0].k

    return {
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "standard": lambda: attention(q, k, v, is_causal=True),
        "shield": shield,
        "poison": lambda: poison(q, rows),
    }


def rows_of(length: int, device: torch.device) -> list[dict[str, Any]]:
    """One for each contender."""
    shape = (BATCH if device.type == "cuda" else 1, HEADS, length, HEAD_DIM)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    calls = contenders(q, k, v)
    about = {"length": length, "batch_size": shape[0], "heads": HEADS, "head_dim": HEAD_DIM}
    found = [
        {**about, "contender": name, "bytes": PASSES[name] * k.numel() * k.element_size()}
        for name in calls
    ]
    with torch.no_grad():
        if device.type == "cuda":
            stopwatch = stopwatch_of(device)
            replays = {name: captured(call, device) for name, call in calls.items()}
            assert all(replays.values()), "a contender cannot be captured as a graph"
            times = interleave(replays, rounds=ROUNDS, stopwatch=stopwatch)  # pyright: ignore[reportArgumentType]
            for row in found:
                timing = times[row["contender"]]
                row["seconds"], row["quartiles"] = timing.median, timing.quartiles
        right = _is_right(calls["standard"], k, v)
    return [{**row, "right": right} for row in found]


def _is_right(standard: Callable[[], Tensor], k: Tensor, v: Tensor) -> bool:
    """Whether a bad token leaves the rows before it as they were and makes the others NaN."""
    token = k.shape[2] // 2 + 3
    clean = standard().clone()
    k[:, 1, token, 3], v[:, 0, token, 5] = math.nan, math.inf
    spoiled = standard()
    return bool(
        torch.equal(clean[:, :, :token], spoiled[:, :, :token])
        and spoiled[:, :, token:].isnan().all()
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Times of shielding the past on a GPU, as JSON lines."
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    # On a CPU values could be read, and nothing would be left to do.
    with patch.object(bad_slots, "can_look", lambda *_, **__: False):
        for length in LENGTHS:
            for row in rows_of(length, device):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
