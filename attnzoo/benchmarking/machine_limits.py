"""What the machine can do, measured: its rate of matrix products and its bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from attnzoo.benchmarking.timing import Stopwatch

TURNS = 7
LONGEST_TURN = 1.0  # seconds
HOPELESS = 0.1  # of the best rate so far
GEMM = {"cpu": 2048, "cuda": 8192}  # rows of the square matrices
#: Heads and tokens of the attentions. On some processors a dtype has no fast matrix product, and
#: SDPA computes in another.
ATTENTION = {"cpu": (16, 1024), "cuda": (64, 8192)}
HEAD_DIMS = (64, 128)
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}  # far above any cache
# Amounts that fit a processor's caches; on CUDA the cache is flushed before each turn.
CACHED_BYTES = tuple(2**power for power in range(14, 28, 2))


@dataclass(frozen=True)
class Limits:
    """The best rates that were measured.

    peak_flops: FLOPs a second, two a multiply-accumulate.
    bandwidth: bytes a second, read and written ones counted, of more data than any cache holds.
    cached: (bytes, bandwidth) of smaller amounts.
    """

    peak_flops: float
    bandwidth: float
    cached: tuple[tuple[int, float], ...] = ()

    def bandwidth_of(self, moved: int) -> float:
        """The best that so many bytes, or more, can be moved with."""
        largest_below = max((size for size, _ in self.cached if size <= moved), default=0)
        return max(
            [self.bandwidth, *(found for size, found in self.cached if size >= largest_below)]
        )


def measure_limits(device: torch.device, dtype: torch.dtype, stopwatch: Stopwatch) -> Limits:
    """The best of some turns of every kernel that may set a limit: large products, SDPA itself,
    copies and sums."""
    rates: list[float] = []
    for flops, call in _products(device, dtype):
        rates.append(flops / _best(call, stopwatch))
        if rates[-1] < HOPELESS * max(rates):
            # The products that follow are larger and take minutes: a CPU that has no fast one in
            # this dtype
            break
    cached = (
        []
        if device.type == "cuda"
        else [(size, _bandwidth(size, device, stopwatch)) for size in CACHED_BYTES]
    )
    return Limits(max(rates), _bandwidth(COPY_BYTES[device.type], device, stopwatch), tuple(cached))


def _products(
    device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[int, Callable[[], object]]]:
    """FLOPs and the call that executes them: SDPA, then products, the smaller ones first."""
    heads, n = ATTENTION[device.type]
    for head_dim in HEAD_DIMS:
        q, k, v = (torch.randn(1, heads, n, head_dim, device=device).to(dtype) for _ in range(3))
        yield (
            4 * heads * n * n * head_dim,
            lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
        )
    for size in (GEMM[device.type] // 8, GEMM[device.type]):
        a = torch.randn(size, size, device=device).to(dtype)
        b, out = a.clone(), torch.empty_like(a)
        yield 2 * size**3, lambda a=a, b=b, out=out: torch.mm(a, b, out=out)


def _bandwidth(moved: int, device: torch.device, stopwatch: Stopwatch) -> float:
    """Bytes a second of the better of a copy, which reads half of them and writes half, and a sum,
    which reads them all."""
    source = torch.zeros(moved // 8, device=device)
    target, whole = torch.empty_like(source), torch.zeros(moved // 4, device=device)
    return moved / min(
        _best(lambda: target.copy_(source), stopwatch), _best(lambda: whole.sum(), stopwatch)
    )


def _best(call: Callable[[], object], stopwatch: Stopwatch) -> float:
    """Seconds of the best turn; of a kernel that is so slow that it sets no limit, of its first."""
    first = stopwatch(call)
    return first if first > LONGEST_TURN else min(stopwatch(call) for _ in range(TURNS))
