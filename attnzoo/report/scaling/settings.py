"""What `attnzoo scaling` computes its tables for."""

from __future__ import annotations

from dataclasses import dataclass

from attnzoo.arguments import check_positive
from attnzoo.cost import article
from attnzoo.cost.hardware import GPU
from attnzoo.cost.model_sizes import TransformerModel


@dataclass(frozen=True)
class Settings:
    """A model on a GPU.

    length: tokens at which variants are compared.
    share: part of the GPU's memory that may be filled, above 0 and at most 1.
    tflops: 10¹² FLOPs a second, the rate of the column that is no roofline.
    Raises ValueError on a value out of range.
    """

    model: TransformerModel
    gpu: GPU
    length: int = 16384
    is_causal: bool = False
    share: float = article.SHARE
    tflops: float = article.RATE / 1e12

    def __post_init__(self) -> None:
        check_positive("length", self.length)
        if not 0 < self.share <= 1:
            raise ValueError(
                f"share={self.share:g} must be above 0 and at most 1: the part of a GPU's memory "
                "that may be filled"
            )
        if not 0 < self.tflops < float("inf"):
            raise ValueError(f"tflops={self.tflops:g} must be above 0")
