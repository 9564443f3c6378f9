"""Pixels: a handwritten digit, read pixel by pixel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnzoo.tasks.task import PARTS, TRAINING, Batch, Task

SIDE, SHADES = 8, 17
HELD_OUT = 360  # images of validation, and of test: a fifth each


@dataclass(frozen=True)
class Pixels(Task):
    """The 1,797 digits of 8 by 8 pixels that come with scikit-learn (Alpaydin and Kaynak 1998), as
    sequences of shades; the answer is the digit.

    enlarge: factor of both sides. 1: 64 tokens; 4: 32 by 32, the 1,024 tokens of Long Range Arena's
    images. Needs scikit-learn.
    """

    enlarge: int = 1

    name = "pixels"
    title = "digits by their pixels"
    form = "encoder"

    def __post_init__(self) -> None:
        self._check_positive()

    @property
    def length(self) -> int:  # type: ignore[override]
        return (SIDE * self.enlarge) ** 2

    @property
    def vocabulary_size(self) -> int:
        return SHADES

    @property
    def answers(self) -> int:
        return 10

    @property
    def outputs(self) -> int:
        return 10

    def examples(self, part: str, count: int, generator: torch.Generator) -> Batch:
        images, digits = _digits()[part]
        if part == TRAINING:
            rows = torch.randint(len(images), (count,), generator=generator)
        elif count <= len(images):
            rows = torch.arange(count)
        else:
            raise ValueError(
                f"held_out={count} is more than the {len(images)} images of {part}; give fewer"
            )
        enlarged = (
            images[rows].repeat_interleave(self.enlarge, 1).repeat_interleave(self.enlarge, 2)
        )
        return Batch(enlarged.flatten(1), digits[rows])


@cache
def _digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Images and digits of the three parts, shuffled once: the writers follow one another in the
    file."""
    try:
        from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "sklearn":
            raise  # scikit-learn is there, and something that it needs is not
        raise ImportError(
            "the task pixels takes its images from scikit-learn; install it with: pip install "
            "'attnzoo[tasks]'"
        ) from None
    found: Any = load_digits()
    images, digits = torch.as_tensor(found.images).long(), torch.as_tensor(found.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    sizes = (len(images) - 2 * HELD_OUT, HELD_OUT, HELD_OUT)
    return dict(
        zip(
            PARTS,
            zip(images[order].split(sizes), digits[order].split(sizes), strict=True),
            strict=True,
        )
    )
