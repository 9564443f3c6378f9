"""The window pattern: keys near a query, with or without dilation and sinks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnzoo.arguments import check_count, check_positive
from attnzoo.call import Call
from attnzoo.engines.sparse.patterns.grid import Grid, grid_of
from attnzoo.engines.sparse.patterns.pattern import BlockTable, Pattern
from attnzoo.sequences.padding import first_real

TABLE_BLOCK = 128  # positions in a block of a window's table, the size FlexAttention is tuned for


@dataclass(frozen=True)
class Window(Pattern):
    """Keys closer than `window` tokens: |i - j| < window. In a causal call these are `window` keys,
    the query's own included.

    Other libraries count differently; the methods `from_...` and `to_...` convert. Hugging Face's
    `sliding_window` is the same number as `window`.

    window: keys at this distance or more are hidden
    dilation: with a dilation only every dilation-th key is visible, (i - j) % dilation == 0, and
        as many keys as without it, |i - j| < window · dilation; one number for all heads, or one
        for each head
    sinks: how many slots at the beginning are visible to every query, too, whatever their distance
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
        """The dilation of each head, or one for all heads."""
        return self.dilation if isinstance(self.dilation, tuple) else (self.dilation,)

    def dilated(self, dilation: int) -> Window:
        """The same with this dilation in every head."""
        return self if self.dilation == dilation else replace(self, dilation=dilation)

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
        """The table of a plain window, one without dilation and sinks. It depends on distances
        alone, so that its blocks may begin anywhere, and no empty rows are needed."""
        first_row = torch.arange(grid.offset, grid.key_length, TABLE_BLOCK, device=grid.device)
        first_key = torch.arange(0, grid.key_length, TABLE_BLOCK, device=grid.device)
        last_row, last_key = (
            (x + TABLE_BLOCK - 1).clamp(max=grid.key_length - 1) for x in (first_row, first_key)
        )
        # The smallest and the largest distance i - j in each block.
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

    def is_fixed(self, call: Call) -> bool:
        mask = call.key_mask
        return not self.sinks or mask is None or bool(mask[:, : self.sinks].all())

    def hides_nothing(self, grid: Grid) -> bool:
        # Only a causal window, which looks back alone, is continued by the sinks at the beginning.
        seen = self.window + self.sinks if grid.is_causal else self.window
        return set(self.dilations) == {1} and max(grid.query_length, grid.key_length) <= seen

    def heads_by_dilation(self, heads: int) -> dict[int, list[int]]:
        """The heads that have each dilation, in ascending order.

        heads: number of query heads

        Raises ValueError if the window has a tuple of dilations of another length.
        """
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
        """The window of `count` heads from head `first` on."""
        return (
            replace(self, dilation=self.dilation[first : first + count])
            if isinstance(self.dilation, tuple)
            else self
        )

    @classmethod
    def from_flash_attention(cls, left: int, right: int) -> Window:
        """The window of flash-attn's window_size=(left, right), in which query i sees the keys
        i - left to i + right.

        left: how many keys before its own the query sees
        right: how many keys after its own; 0 when causal, else it must equal left

        Raises ValueError for any other right, and for a negative left.
        """
        if left < 0 or right not in (0, left):
            raise ValueError(
                f"window_size=({left}, {right}) has no equal here; give left >= 0 and right = 0 "
                "(with is_causal=True) or right = left"
            )
        return cls(left + 1)

    def to_flash_attention(self, is_causal: bool) -> tuple[int, int]:
        """flash-attn's window_size=(left, right) for this window.

        is_causal: whether later keys are hidden, which makes right 0

        Raises ValueError if the window has a dilation or sinks, which flash-attn has not.
        """
        self._check_plain("flash-attn")
        return self.window - 1, 0 if is_causal else self.window - 1

    @classmethod
    def from_longformer(cls, attention_window: int) -> Window:
        """The window of Longformer's attention_window.

        attention_window: an even number of keys, half of them on each side of the query, which
            sees its own key besides

        Raises ValueError if the number is odd.
        """
        if check_positive("attention_window", attention_window) % 2:
            raise ValueError(
                f"attention_window={attention_window} must be even: half on each side of the query"
            )
        return cls(attention_window // 2 + 1)

    def to_longformer(self) -> int:
        """Longformer's attention_window for this window. Raises ValueError if the window has a
        dilation or sinks, or shows the query's own key alone."""
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
