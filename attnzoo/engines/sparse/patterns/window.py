"""The window: keys near a query, with or without dilation and sinks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnzoo.arguments import check_count, check_positive
from attnzoo.call import Call
from attnzoo.engines.sparse.patterns.grid import Grid, grid_of
from attnzoo.engines.sparse.patterns.pattern import BlockTable, Pattern
from attnzoo.sequences.padding import first_real

TABLE_BLOCK = 128  # positions in a block of a window's table: what FlexAttention is tuned for


@dataclass(frozen=True)
class Window(Pattern):
    """Keys closer than `window` tokens: |i - j| < window. Causal, that is `window` keys, the
    query's own included.

    dilation: of these distances only every dilation-th, |i - j| < window · dilation with (i - j) %
    dilation == 0: as many keys, from farther. One number for all heads, or one for each head.
    sinks: the first so many slots are visible too, whatever the distance. Other libraries count
    otherwise; the converters speak their dialects. Hugging Face's `sliding_window` is `window`
    itself.
    """

    window: int
    dilation: int | tuple[int, ...] = 1
    sinks: int = 0
    table_block_size = TABLE_BLOCK

    def __post_init__(self) -> None:
        check_positive("window", self.window)
        if self.dilation == ():
            raise ValueError("dilation=() is empty; give one number, or one for each head")
        for dilation in self.dilations:
            check_positive("dilation", dilation)
        check_count("sinks", self.sinks)

    @property
    def dilations(self) -> tuple[int, ...]:
        """One for each head, or one for all."""
        return self.dilation if isinstance(self.dilation, tuple) else (self.dilation,)

    @property
    def reach(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return None if self.sinks else self.near

    @property
    def near(self) -> int:
        """How many keys back a causal query can see in the window alone, itself included."""
        return (self.window - 1) * max(self.dilations) + 1

    @property
    def remembers(self) -> int:
        return self.near + self.sinks

    def mask(self, grid: Grid) -> Tensor:
        distance = grid.query_positions() - grid.key_positions()
        dilation = torch.tensor(self.dilations, device=grid.device)[:, None, None]
        return (distance.abs() < self.window * dilation) & (distance % dilation == 0) | (
            grid.key_positions() < self.sinks
        )

    @property
    def farthest(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.window

    def table(self, grid: Grid) -> BlockTable:
        """Of a plain window, which is the same wherever its blocks begin."""
        first_row = torch.arange(grid.offset, grid.key_length, TABLE_BLOCK, device=grid.device)
        first_key = torch.arange(0, grid.key_length, TABLE_BLOCK, device=grid.device)
        last_row, last_key = (
            (x + TABLE_BLOCK - 1).clamp(max=grid.key_length - 1) for x in (first_row, first_key)
        )
        # The least and the largest distance i - j in a block.
        nearest, farthest = first_row[:, None] - last_key, last_row[:, None] - first_key
        least = 0 if grid.is_causal else 1 - self.window
        seen = (farthest >= least) & (nearest < self.window)
        filled = first_key + TABLE_BLOCK <= grid.key_length
        whole = (nearest >= least) & (farthest < self.window) & filled
        return BlockTable(0, seen[None], whole[None])

    def support(self, call: Call) -> Tensor:
        if call.key_mask is None or not self.sinks:
            return self.mask(grid_of(call))
        near = replace(self, sinks=0).mask(grid_of(call))
        return near | first_real(call.key_mask, self.sinks)[:, None, None]

    def hides_nothing(self, grid: Grid) -> bool:
        seen = (
            self.window + self.sinks if grid.is_causal else self.window
        )  # the first slots lie behind a window that looks back alone
        return set(self.dilations) == {1} and max(grid.query_length, grid.key_length) <= seen

    def heads_by_dilation(self, heads: int) -> dict[int, list[int]]:
        """The heads of every dilation, in ascending order. Raises ValueError when there is not one
        dilation for each head."""
        if not isinstance(self.dilation, tuple):
            return {self.dilation: list(range(heads))}
        if len(self.dilation) != heads:
            raise ValueError(
                f"dilation={self.dilation} gives {len(self.dilation)} numbers for heads={heads}; "
                "give one number, or one for each head"
            )
        found: dict[int, list[int]] = {}
        for head, dilation in enumerate(self.dilation):
            found.setdefault(dilation, []).append(head)
        return found

    def of_heads(self, first: int, count: int) -> Window:
        """The window of these heads alone."""
        return (
            replace(self, dilation=self.dilation[first : first + count])
            if isinstance(self.dilation, tuple)
            else self
        )

    @classmethod
    def from_flash_attention(cls, left: int, right: int) -> Window:
        """flash-attn's window_size=(left, right): keys i - left .. i + right. right is 0 when
        causal, else it must equal left."""
        if left < 0 or right not in (0, left):
            raise ValueError(
                f"window_size=({left}, {right}) has no equal here; give left >= 0 and right = 0 "
                "(with is_causal=True) or right = left"
            )
        return cls(left + 1)

    def to_flash_attention(self, is_causal: bool) -> tuple[int, int]:
        """As flash-attn's window_size=(left, right). Raises ValueError where it has no such
        window."""
        self._check_plain("flash-attn")
        return self.window - 1, 0 if is_causal else self.window - 1

    @classmethod
    def from_longformer(cls, attention_window: int) -> Window:
        """Longformer's attention_window: an even number of keys, half of them on each side, and the
        query's own."""
        if check_positive("attention_window", attention_window) % 2:
            raise ValueError(
                f"attention_window={attention_window} must be even: half on each side of the query"
            )
        return cls(attention_window // 2 + 1)

    def to_longformer(self) -> int:
        """As Longformer's attention_window. Raises ValueError where it has no such window."""
        self._check_plain("Longformer's code")
        if self.window == 1:
            raise ValueError(
                "window=1 (the query's own key alone) has no equal in Longformer, whose "
                "attention_window is at least 2"
            )
        return 2 * (self.window - 1)

    def _check_plain(self, where: str) -> None:
        if set(self.dilations) != {1} or self.sinks:
            raise ValueError(
                f"dilation={self.dilation} with sinks={self.sinks} has no equal in {where}; only a "
                "plain window has"
            )
