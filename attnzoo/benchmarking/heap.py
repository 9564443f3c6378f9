"""Memory for what is measured: running out of it as an error that can be caught, and blocks that
malloc keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

HEADROOM = 0.9  # of the memory that is free, for everything allocated from now on
LARGEST_KEPT = 31 * 2**20  # bytes; glibc gives larger blocks back in any case


@contextmanager
def bounded_memory(device: torch.device) -> Iterator[None]:
    """On a CPU under Linux, have allocations beyond what is free fail, where the system would end
    the process; elsewhere do nothing."""
    if device.type != "cpu":
        yield
        return
    try:
        import resource

        free = _kilobytes(Path("/proc/meminfo"), "MemAvailable:") * 1024
        held = _kilobytes(Path("/proc/self/status"), "VmSize:") * 1024
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (held + int(HEADROOM * free), before[1]))
    except (ImportError, OSError, ValueError, StopIteration):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def settle_heap() -> None:
    """Let malloc keep the memory that a pass frees.

    Until a block of a size has been freed once, glibc gives such blocks back to the system, and the
    next pass pays for every page of its results again. A process that trains is past that after its
    first step.
    """
    torch.empty(LARGEST_KEPT, dtype=torch.uint8)  # made, and freed at once


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that there is no memory, on any device."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "can't allocate memory" in str(error)
        or "std::bad_alloc" in str(error)
    )


def _kilobytes(path: Path, name: str) -> int:
    return int(
        next(line for line in path.read_text().splitlines() if line.startswith(name)).split()[1]
    )
