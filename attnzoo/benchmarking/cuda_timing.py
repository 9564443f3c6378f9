"""Timing on CUDA: events around a call on a flushed L2 cache, and the same call as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

from attnzoo.benchmarking.timing import Stopwatch, wall_clock

CAPTURE_WARMUPS = 3
FLUSH_CACHES = 2  # bytes written between calls, in sizes of the L2 cache


class DeviceLost(Exception):
    """The CUDA device does not answer any more: after an illegal access every later call of the
    process fails."""


class EventClock:
    """A stopwatch of the device's own time: writes over the L2 cache, then records an event before
    and one after the call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(FLUSH_CACHES * cache, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        with torch.cuda.device(self.device):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            call()
            stop.record()
            stop.synchronize()
        return start.elapsed_time(stop) * 1e-3


def stopwatch_of(device: torch.device) -> Stopwatch:
    """The stopwatch of a device: events on CUDA, the processor's clock elsewhere."""
    return EventClock(device) if device.type == "cuda" else wall_clock


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object] | None:
    """A replay of the call as a CUDA graph, on the inputs it had when captured; None when it cannot
    be captured."""
    try:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(CAPTURE_WARMUPS):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            return graph.replay
    except RuntimeError:
        # The call waits for the device, or allocates in a way that a graph cannot hold.
        torch.cuda.synchronize(device)
        return None


def check_answers(device: torch.device) -> None:
    """Raise DeviceLost when a CUDA device has stopped answering."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise DeviceLost(" ".join(str(error).split())[:200]) from error
