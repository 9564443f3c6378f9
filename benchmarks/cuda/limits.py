"""The least time that a GPU can need for each variant, to set measured times against: one JSON line a variant, phase and length.

    python benchmarks/cuda/limits.py --gpu h100 > limits.jsonl
    python benchmarks/cuda/limits.py --gpu memory_gb=80,tflops=700,bandwidth_gb=2900 > limits.jsonl   # measured rates

Computed from closed forms; no GPU is needed and none is used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import attnzoo
from attnzoo.cost.hardware import GPU, find_gpu, gpu_presets, roofline

BATCH_SIZE, HEADS, HEAD_DIM, ELEMENT_BYTES = 8, 16, 64, 2  # bf16
LENGTHS = [1024 * 2**i for i in range(8)]
TENSORS = {"forward": 4, "forward+backward": 12}  # q, k, v, out; backward reads them and out's gradient, and writes three gradients
PASSES = {"forward": 1, "forward+backward": 3}  # every product has two gradients, and nothing is computed again


def rows(gpu: GPU) -> Iterator[dict[str, Any]]:
    """Every variant that has a closed form, forward and forward+backward, causal and not where the variant allows."""
    for name in attnzoo.names():
        spec = attnzoo.describe(name).spec
        for is_causal in (False, True):
            if spec.causal if is_causal else spec.bidirectional:
                for phase in PASSES:
                    for n in LENGTHS:
                        yield row(name, n, phase, gpu, is_causal=is_causal)


def row(name: str, n: int, phase: str, gpu: GPU, *, is_causal: bool) -> dict[str, Any]:
    """macs: what A's support needs where A is exact on it, else what the algorithm executes. bytes: every tensor once."""
    spec = attnzoo.describe(name).spec
    attn = attnzoo.build(name, heads=HEADS, head_dim=HEAD_DIM, **({"max_length": n} if spec.needs_max_length else {}))
    cost = attn.cost(BATCH_SIZE, n, is_causal=is_causal)
    macs = (cost.support_macs if spec.exact else cost.macs) * PASSES[phase]
    weights = sum(parameter.numel() for parameter in attn.parameters()) * PASSES[phase]
    moved = (TENSORS[phase] * BATCH_SIZE * HEADS * HEAD_DIM * n + weights) * ELEMENT_BYTES
    limit = roofline(macs, moved, gpu)
    sizes = {"batch_size": BATCH_SIZE, "heads": HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16"}
    least = {"gpu": gpu.title, "macs": macs, "bytes": moved, "limit_seconds": limit.seconds, "bound": limit.bound}
    return {"variant": name, "length": n, "phase": phase, "is_causal": is_causal, **sizes, **least}


def main() -> None:
    parser = argparse.ArgumentParser(description="Least times by variant and length, as JSON lines.")
    parser.add_argument("--gpu", default="h100", help=f"a preset ({', '.join(gpu_presets())}) or {GPU.EXAMPLE}")
    try:
        gpu = find_gpu(parser.parse_args().gpu, gpu_presets())
    except ValueError as error:
        sys.exit(f"error: {error}")
    for line in rows(gpu):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
