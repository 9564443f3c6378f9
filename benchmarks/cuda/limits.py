"""The least time that a GPU can need for each variant, to set measured times against: one JSON line
a variant, phase and length.

    python benchmarks/cuda/limits.py --gpu h100 > limits.jsonl
    python benchmarks/cuda/limits.py --gpu memory_gb=80,tflops=700,bandwidth_gb=2900 > limits.jsonl
        # measured rates

Computed from closed forms; no GPU is needed and none is used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import attnzoo
from attnzoo.benchmarking.arithmetic import least_bytes, macs
from attnzoo.benchmarking.plan import Cell, Shape
from attnzoo.cost.hardware import GPU, find_gpu, gpu_presets, roofline
from attnzoo.registry import sized

SHAPE, DTYPE = Shape(batch_size=8, heads=16, head_dim=64), "bfloat16"
LENGTHS = [1024 * 2**i for i in range(8)]
PHASES = ("forward", "forward+backward")


def rows(gpu: GPU) -> Iterator[dict[str, Any]]:
    """Every variant, forward and forward+backward, causal and not where the variant allows; counted
    as the benchmark counts."""
    for name in attnzoo.names():
        spec = attnzoo.describe(name).spec
        for is_causal in spec.forms:
            for phase in PHASES:
                for n in LENGTHS:
                    yield row(name, Cell("core", phase, is_causal, n, DTYPE, SHAPE), gpu)


def row(name: str, cell: Cell, gpu: GPU) -> dict[str, Any]:
    """One line. limit_seconds: all FLOPs at the peak rate or all bytes at the full bandwidth,
    whichever takes longer (`bound`)."""
    attn = attnzoo.build(
        name, heads=SHAPE.heads, head_dim=SHAPE.head_dim, **sized(name, cell.length)
    )
    products, moved = macs(attn, cell), least_bytes(attn, cell)
    assert products is not None  # only decoding has none
    limit = roofline(products, moved, gpu)
    setting = {
        "variant": name,
        "length": cell.length,
        "phase": cell.phase,
        "is_causal": cell.is_causal,
        "dtype": DTYPE,
        **asdict(SHAPE),
    }
    return {
        **setting,
        "gpu": gpu.title,
        "macs": products,
        "bytes": moved,
        "limit_seconds": limit.seconds,
        "bound": limit.bound,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Least times by variant and length, as JSON lines."
    )
    parser.add_argument(
        "--gpu", default="h100", help=f"a preset ({', '.join(gpu_presets())}) or {GPU.EXAMPLE}"
    )
    try:
        gpu = find_gpu(parser.parse_args().gpu, gpu_presets())
    except ValueError as error:
        sys.exit(f"error: {error}")
    for line in rows(gpu):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
