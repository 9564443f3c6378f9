"""What all contenders share: the sizes of equal work, our variant of each group, and a peer that
was built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peer_formulas import Formula
from torch import Tensor, nn

from attnzoo.benchmarking.plan import Cell
from attnzoo.registry import Choice

WINDOW, BLOCK_SIZE, FEATURES, RANK, LANDMARKS, PSEUDO_INVERSE_STEPS = 256, 64, 256, 256, 256, 6

#: Our variant of each group's mathematics.
OURS: dict[str, Choice] = {
    "exact": Choice("standard"),
    "window": Choice("sliding_window", {"window": WINDOW}),
    "bigbird": Choice(
        "bigbird",
        {
            "block_size": BLOCK_SIZE,
            "num_window_blocks": 3,
            "num_global_blocks": 2,
            "num_random_blocks": 3,
        },
    ),
    "linear": Choice("linear"),
    "efficient": Choice("linear", {"feature_map": "softmax"}),
    "performer": Choice("performer", {"num_features": FEATURES}),
    "linformer": Choice("linformer", {"rank": RANK, "sharing": "headwise"}),
    "nystrom": Choice(
        "nystromformer", {"num_landmarks": LANDMARKS, "iterations": PSEUDO_INVERSE_STEPS}
    ),
}


@dataclass(frozen=True)
class Ready:
    """A peer, built for one setting. forward: q, k, v in the peer's layout -> output; parameters:
    learned ones that take gradients."""

    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    formula: Formula | None
    parameters: tuple[Tensor, ...] = ()
    compile_seconds: float | None = None


class Given(nn.Module):
    """In the place of a projection: hands over what it was given, whatever comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Any = None

    def forward(self, x: Tensor) -> Any:
        return self.value


class Thirds(tuple[Tensor, ...]):
    """q, k and v where a module would cut one tensor in three."""

    def chunk(self, chunks: int, dim: int) -> tuple[Tensor, ...]:
        return self


def width_of(cell: Cell) -> int:
    return cell.shape.heads * cell.shape.head_dim
