"""What the machine can do, measured: its rate of matrix products and its bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnzoo.bench.timing import Stopwatch

TURNS = 7
GEMM = {"cpu": 2048, "cuda": 8192}  # rows of the square matrices
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}  # far above any cache


@dataclass(frozen=True)
class Limits:
    """peak_flops: FLOPs a second, two a multiply-accumulate; bandwidth: bytes a second, read and written ones counted."""

    peak_flops: float
    bandwidth: float


def measure_limits(device: torch.device, dtype: torch.dtype, stopwatch: Stopwatch) -> Limits:
    """The best of some turns of one large matrix product in `dtype` and of one large copy."""
    size = GEMM[device.type]
    a = torch.randn(size, size, device=device).to(dtype)
    b, out = a.clone(), torch.empty_like(a)
    source = torch.zeros(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    product = _best(lambda: torch.mm(a, b, out=out), stopwatch)
    copy = _best(lambda: target.copy_(source), stopwatch)
    return Limits(2 * size**3 / product, 2 * COPY_BYTES[device.type] / copy)


def _best(call: Callable[[], object], stopwatch: Stopwatch) -> float:
    call()
    return min(stopwatch(call) for _ in range(TURNS))
