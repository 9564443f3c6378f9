"""The peak of what a call allocates, by the allocator's own account and not by the size of the
process."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Highest sum of bytes allocated on `device` while `call` runs, beyond what was allocated
    before it; its result counts.

    CPU: the running sum of the allocator's events, which torch's profiler records. CUDA: the
    caching allocator's own peak.
    Raises ValueError on any other device.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _cpu_peak(call)
    if device.type == "cuda":
        return _cuda_peak(call, device)
    raise ValueError(f"device={str(device)!r}: memory is tracked on 'cpu' and 'cuda' only")


def _cpu_peak(call: Callable[[], object]) -> int:
    # The profiler would announce its start and stop on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    profiler: Any = torch.autograd.profiler.profile(profile_memory=True)
    with profiler:
        result = call()
    del result
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _cuda_peak(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before
