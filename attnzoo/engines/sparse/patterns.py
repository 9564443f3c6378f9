"""Which keys a query may see: the support of a sparse A, as small patterns joined by `|` and `&`.

Query i stands at position key_length - query_length + i. Causality is not a pattern: the engine
intersects with it, and a pattern is told of it only because some (global blocks, random draws)
choose differently then.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from attnzoo.arguments import check_count, check_positive
from attnzoo.call import Call
from attnzoo.eager import can_look, unrecorded
from attnzoo.padding import ends, leading


@dataclass(frozen=True)
class Grid:
    """The sizes that a pattern is laid over."""

    heads: int
    query_length: int
    key_length: int
    is_causal: bool
    device: torch.device | str | None = None

    @property
    def offset(self) -> int:
        return self.key_length - self.query_length

    def query_positions(self) -> Tensor:
        """(1, query_length, 1)."""
        return torch.arange(self.offset, self.key_length, device=self.device)[None, :, None]

    def key_positions(self) -> Tensor:
        """(1, 1, key_length)."""
        return torch.arange(self.key_length, device=self.device)[None, None]

    def query_blocks(self, block_size: int) -> Tensor:
        """Blocks of positions that hold a query, (query_blocks,); negative where there are more
        queries than keys."""
        return torch.arange(
            self.offset // block_size, (self.key_length - 1) // block_size + 1, device=self.device
        )

    def num_key_blocks(self, block_size: int) -> int:
        """Blocks of slots that hold keys."""
        return -(-self.key_length // block_size)

    def filled_blocks(self, block_size: int) -> Tensor:
        """Blocks of positions up to the last key, (1, 1), or (batch, 1, 1) in a `PaddedGrid`."""
        return torch.full((1, 1), self.num_key_blocks(block_size), device=self.device)


@dataclass(frozen=True, eq=False)
class PaddedGrid(Grid):
    """A grid whose samples are padded: positions count from the first real token of each, so that
    they have a batch dimension in front.

    length: (batch,), positions from the first real token to the last key. first: (batch,), the slot
    of position 0; None: slot 0 in every sample.
    """

    length: Tensor = field(kw_only=True)
    first: Tensor | None = field(kw_only=True, default=None)

    def query_positions(self) -> Tensor:
        """(batch, 1, query_length, 1)."""
        return self._counted(super().query_positions())

    def key_positions(self) -> Tensor:
        """(batch, 1, 1, key_length); what is padded has a position too, and its key_mask hides
        it."""
        return self._counted(super().key_positions())

    def _counted(self, slots: Tensor) -> Tensor:
        return slots[None] if self.first is None else slots - self.first[:, None, None, None]

    def query_blocks(self, block_size: int) -> Tensor:
        """Of all samples together."""
        if self.first is None:
            return super().query_blocks(block_size)
        lowest, highest = 0, self.key_length
        if can_look(self.first):
            lowest, highest = int(self.first.min()), int(self.first.max())
        low, high = self.offset - highest, self.key_length - 1 - lowest
        return torch.arange(low // block_size, high // block_size + 1, device=self.device)

    def filled_blocks(self, block_size: int) -> Tensor:
        return ((self.length + block_size - 1) // block_size)[:, None, None]


def padded(grid: Grid, key_mask: Tensor) -> PaddedGrid:
    """The grid of a call with this key_mask, (batch, key_length) bool. A causal one does not know
    where its samples end."""
    first = leading(key_mask)
    length = (grid.key_length if grid.is_causal else ends(key_mask)) - first
    return PaddedGrid(**vars(grid), length=length, first=first)


def grid_of(call: Call) -> Grid:
    """The sizes of a call, for its pattern."""
    return Grid(
        _constant(call.q.shape[1]),
        _constant(call.query_length),
        _constant(call.key_length),
        call.is_causal,
        call.q.device,
    )


def _constant(length: int) -> int:
    """The same number, which a compiled graph then takes as a constant: a layout is made for one
    length. int() would stay symbolic."""
    return len(range(int(length)))


class Pattern:
    """A set of keys for every query. reach: how many keys back a causal query can see, itself
    included (None: to the first).

    counts_positions: whether it depends on how far from the first token a key stands, and not on
    distances alone. tied_to_end: whether, without causality, it depends on how far from the last.
    """

    reach: int | None = None
    counts_positions: bool = False
    tied_to_end: bool = False

    @property
    def remembers(self) -> int | None:
        """How many keys decoding must keep, at most (None: all)."""
        return self.reach

    def mask(self, grid: Grid) -> Tensor:
        """(heads or 1, query_length, key_length) bool, True = visible, causality left out; in a
        `PaddedGrid` (batch or 1, heads or 1, query_length, key_length)."""
        raise NotImplementedError

    def hides_nothing(self, grid: Grid) -> bool:
        """Whether every query sees every key that causality shows it. False also where finding out
        would cost more than it brings."""
        return False

    def __or__(self, other: Pattern) -> Pattern:
        return Union(self, other)

    def __and__(self, other: Pattern) -> Pattern:
        return Intersection(self, other)


@dataclass(frozen=True)
class Union(Pattern):
    """Keys that either pattern shows."""

    left: Pattern
    right: Pattern

    @property
    def reach(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        reaches = (self.left.reach, self.right.reach)
        return None if None in reaches else max(r for r in reaches if r is not None)

    @property
    def counts_positions(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.left.counts_positions or self.right.counts_positions

    def mask(self, grid: Grid) -> Tensor:
        return self.left.mask(grid) | self.right.mask(grid)


@dataclass(frozen=True)
class Intersection(Pattern):
    """Keys that both patterns show."""

    left: Pattern
    right: Pattern

    @property
    def reach(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return min((r for r in (self.left.reach, self.right.reach) if r is not None), default=None)

    @property
    def counts_positions(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.left.counts_positions or self.right.counts_positions

    def mask(self, grid: Grid) -> Tensor:
        return self.left.mask(grid) & self.right.mask(grid)


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


class BlockPattern(Pattern):
    """A pattern in whole blocks of `block_size` positions, so that the engine can fetch keys block
    by block."""

    block_size: int
    counts_positions = True

    @property
    def most_blocks(self) -> int:
        """Key blocks that a query block lists at most."""
        raise NotImplementedError

    def key_blocks(self, grid: Grid) -> Tensor:
        """Key blocks that each query block sees, (heads or 1, query_blocks, width), -1 for none;
        repetitions are allowed. A query block that sees everything (`sees_all`) may list any
        part."""
        raise NotImplementedError

    def sees_all(self, grid: Grid) -> Tensor:
        """Query blocks that see every key, (1, query_blocks) bool; (batch, 1, query_blocks) in a
        `PaddedGrid`."""
        return torch.zeros_like(grid.query_blocks(self.block_size), dtype=torch.bool)[None]

    def seen_blocks(self, grid: Grid) -> Tensor:
        """`key_blocks` and `sees_all` as a table, (heads or 1, query_blocks, key_blocks) bool,
        causality left out."""
        blocks = self.key_blocks(grid)
        count = grid.num_key_blocks(self.block_size)
        seen = blocks.new_zeros(*blocks.shape[:-1], count + 1, dtype=torch.bool)
        seen.scatter_(
            -1, blocks % (count + 1), torch.ones_like(blocks, dtype=torch.bool)
        )  # -1 lands in the extra column
        return seen[..., :count] | self.sees_all(grid)[..., None]

    def hides_nothing(self, grid: Grid) -> bool:
        if torch.compiler.is_compiling() or grid.num_key_blocks(self.block_size) > self.most_blocks:
            return False
        return _sees_every_block(self, replace(grid, device="cpu"))

    def mask(self, grid: Grid) -> Tensor:
        seen = self.seen_blocks(grid)
        queries, keys = (
            x // self.block_size for x in (grid.query_positions(), grid.key_positions())
        )
        rows = queries - grid.query_blocks(self.block_size)[0]
        ahead = [torch.arange(size, device=seen.device) for size in seen.shape[:-2]]
        ahead = [x.view(-1, *[1] * (seen.dim() - 1 - place)) for place, x in enumerate(ahead)]
        return seen[(*ahead, rows, keys.clamp(min=0))]

    def __or__(self, other: Pattern) -> Pattern:
        if isinstance(other, BlockPattern) and other.block_size == self.block_size:
            return BlockUnion(self, other)
        return Union(self, other)


@lru_cache
def _sees_every_block(pattern: BlockPattern, grid: Grid) -> bool:
    with unrecorded():
        hidden = ~pattern.seen_blocks(grid)
        if grid.is_causal:
            hidden &= grid.query_blocks(pattern.block_size)[:, None] >= torch.arange(
                hidden.shape[2], device=hidden.device
            )
        return not bool(hidden.any())


@dataclass(frozen=True)
class BlockUnion(BlockPattern):
    """Blocks that either pattern shows."""

    left: BlockPattern
    right: BlockPattern

    @property
    def tied_to_end(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.left.tied_to_end or self.right.tied_to_end

    @property
    def block_size(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.left.block_size

    @property
    def most_blocks(self) -> int:
        return self.left.most_blocks + self.right.most_blocks

    def key_blocks(self, grid: Grid) -> Tensor:
        left, right = self.left.key_blocks(grid), self.right.key_blocks(grid)
        heads = max(left.shape[-3], right.shape[-3])
        sizes = [(*x.shape[:-3], heads, *x.shape[-2:]) for x in (left, right)]
        return torch.cat([left.expand(sizes[0]), right.expand(sizes[1])], -1)

    def sees_all(self, grid: Grid) -> Tensor:
        return self.left.sees_all(grid) | self.right.sees_all(grid)


@dataclass(frozen=True)
class WindowBlocks(BlockPattern):
    """The query's own block and (num_blocks - 1) / 2 blocks on each side; num_blocks is odd."""

    num_blocks: int
    block_size: int

    def __post_init__(self) -> None:
        check_positive("block_size", self.block_size)
        if check_positive("num_window_blocks", self.num_blocks) % 2 == 0:
            raise ValueError(
                f"num_window_blocks={self.num_blocks} must be odd: the query's own block and as "
                "many on each side"
            )

    @property
    def most_blocks(self) -> int:
        return self.num_blocks

    def key_blocks(self, grid: Grid) -> Tensor:
        side = (self.num_blocks - 1) // 2
        blocks = grid.query_blocks(self.block_size)[:, None] + torch.arange(
            -side, side + 1, device=grid.device
        )
        inside = (blocks >= 0) & (blocks < grid.filled_blocks(self.block_size)[..., None])
        return blocks.where(inside, -1)


@dataclass(frozen=True)
class GlobalBlocks(BlockPattern):
    """Blocks that everyone sees and that see everyone: the first and last ones in turn, or the
    first ones only when causal."""

    num_blocks: int
    block_size: int
    tied_to_end = True

    def __post_init__(self) -> None:
        check_positive("block_size", self.block_size)
        check_count("num_global_blocks", self.num_blocks)

    @property
    def most_blocks(self) -> int:
        return self.num_blocks

    def _blocks(self, grid: Grid) -> Tensor:
        """(1, 1, num_blocks), with a batch dimension in front in a `PaddedGrid`; -1 for none."""
        count = grid.filled_blocks(self.block_size)[..., None]
        index = torch.arange(self.num_blocks, device=grid.device)
        first = self.num_blocks if grid.is_causal else -(-self.num_blocks // 2)
        blocks = torch.where(index < first, index, count - self.num_blocks + index)
        return blocks.where((blocks >= 0) & (blocks < count), -1)

    def key_blocks(self, grid: Grid) -> Tensor:
        rows, blocks = len(grid.query_blocks(self.block_size)), self._blocks(grid)
        return blocks.expand(*blocks.shape[:-2], rows, -1)

    def sees_all(self, grid: Grid) -> Tensor:
        blocks = self._blocks(grid)
        return ((grid.query_blocks(self.block_size)[:, None] == blocks) & (blocks >= 0)).any(-1)
