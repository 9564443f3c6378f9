"""GPUs by the three numbers that bound an attention: memory, peak rate and bandwidth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from attnzoo.configuration import configs_folder
from attnzoo.cost.presets import choose, read_presets


@dataclass(frozen=True)
class GPU:
    """A GPU by its datasheet.

    memory_gb: 10⁹ bytes.
    tflops: dense bf16 peak, 10¹² FLOPs a second, a multiply and an add being two.
    bandwidth_gb: of its memory, 10⁹ bytes a second.
    """

    EXAMPLE: ClassVar[str] = "memory_gb: 48, tflops: 150, bandwidth_gb: 700"

    title: str
    memory_gb: float
    tflops: float
    bandwidth_gb: float

    def __post_init__(self) -> None:
        for name in ("memory_gb", "tflops", "bandwidth_gb"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name):g} must be above 0")

    @property
    def memory_bytes(self) -> float:
        return self.memory_gb * 1e9


@dataclass(frozen=True)
class Roofline:
    """The least time that a GPU can need: all of its FLOPs at the peak rate, or all of its bytes at
    the full bandwidth."""

    compute_seconds: float
    memory_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def bound(self) -> str:
        return "compute" if self.compute_seconds >= self.memory_seconds else "bandwidth"


def roofline(macs: int, moved_bytes: int, gpu: GPU) -> Roofline:
    """Least time of `macs` multiply-accumulates (two FLOPs each) that move `moved_bytes` to or from
    the GPU's memory."""
    return Roofline(2 * macs / (gpu.tflops * 1e12), moved_bytes / (gpu.bandwidth_gb * 1e9))


def gpu_presets(own: Path | None = None) -> dict[str, GPU]:
    """The presets of `configs/gpus.yaml`, and those of a YAML file of the user's own over them."""
    shipped = read_presets(GPU, configs_folder() / "gpus.yaml")
    return shipped if own is None else shipped | read_presets(GPU, own)


def find_gpu(text: str, presets: dict[str, GPU]) -> GPU:
    """A preset by name, or `memory_gb=48,tflops=150,bandwidth_gb=700`."""
    return choose(GPU, text, presets, "gpu")
