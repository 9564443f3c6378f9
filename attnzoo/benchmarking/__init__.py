"""Measuring: time in interleaved rounds, memory by the allocator's own account."""

from attnzoo.benchmarking.peak_memory import peak_bytes
from attnzoo.benchmarking.timing import Timing, interleave, mistake

__all__ = ["Timing", "interleave", "mistake", "peak_bytes"]
