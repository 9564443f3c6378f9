"""Block-sparse attention: the key blocks that a query block sees are gathered side by side, and a
run of query blocks with equally many distinct key blocks is one SDPA call that needs no mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import unrecorded
from attnzoo.engines.piece_by_piece import at_a_time, join
from attnzoo.engines.softmax import tiles
from attnzoo.engines.softmax.reference import SoftmaxReference
from attnzoo.engines.softmax.sdpa import sdpa
from attnzoo.engines.sparse.patterns.block_patterns import BlockPattern, block_limit, distinct
from attnzoo.engines.sparse.patterns.grid import Grid, PaddedGrid, grid_of
from attnzoo.padding import ends, fetched, slots_of

GATHERED = 2**18  # numbers of k that are gathered at a time: with as many of v they stay in cache


@dataclass(frozen=True)
class Run:
    """Consecutive query blocks first..end (counted from the first that holds a query) that see
    `width` key blocks each.

    sees_all: they see every key. tail: some of them see the last key block, and it is partly
    filled.
    """

    first: int
    end: int
    width: int
    sees_all: bool
    tail: bool


def runs(pattern: BlockPattern, grid: Grid) -> list[Run]:
    """Split the query blocks into runs."""
    return [
        Run(*fields)
        for fields in _constant_runs(
            pattern, grid.heads, grid.query_length, grid.key_length, grid.is_causal
        )
    ]


def _constant_runs(
    pattern: BlockPattern, heads: int, query_length: int, key_length: int, is_causal: bool
) -> tuple[tuple, ...]:
    """Fields of each run. A compiled or exported graph takes the answer as a constant: it depends
    on sizes and the seed only."""
    with unrecorded():
        return _fields_of_runs(pattern, Grid(heads, query_length, key_length, is_causal, "cpu"))


# What torch.compiler.assume_constant_result sets; calling it here would import the compiler, a
# second, for everyone.
_constant_runs._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@lru_cache(maxsize=256)
def _fields_of_runs(pattern: BlockPattern, grid: Grid) -> tuple[tuple, ...]:
    blocks = sorted_key_blocks(pattern, grid)
    last = grid.num_key_blocks(pattern.block_size) - 1
    ragged = (
        grid.key_length % pattern.block_size > 0 and not grid.is_causal
    )  # when causal, only the diagonal block meets the ragged end
    widths = (blocks <= last).sum(-1)[0]
    sees_all = (
        torch.zeros_like(widths, dtype=torch.bool) if grid.is_causal else pattern.sees_all(grid)[0]
    )
    tail = (blocks == last).any(-1).any(0).long() * int(ragged)
    fields = torch.stack([torch.where(sees_all, last + 1, widths), sees_all.long(), tail], 1)
    distinct_fields, lengths = fields.unique_consecutive(dim=0, return_counts=True)
    ends = lengths.cumsum(0)
    rows = zip((ends - lengths).tolist(), ends.tolist(), distinct_fields.tolist(), strict=True)
    return tuple(
        (first, end, width, bool(full), bool(tail)) for first, end, (width, full, tail) in rows
    )


def sorted_key_blocks(pattern: BlockPattern, grid: Grid) -> Tensor:
    """Distinct key blocks of each query block in ascending order, (heads or 1, query_blocks,
    width); what is over is past every block."""
    return distinct(pattern.key_blocks(grid), block_limit(grid, pattern.block_size))


def count_pairs(pattern: BlockPattern, grid: Grid) -> tuple[int, int]:
    """(head, query, key) triples: those computed, and those visible."""
    size, last = pattern.block_size, grid.num_key_blocks(pattern.block_size) - 1
    tail = grid.key_length - last * size
    computed = 0
    for run in runs(pattern, grid):
        keys = grid.key_length if run.sees_all else run.width * size
        computed += grid.heads * (run.end - run.first) * size * keys
    blocks = sorted_key_blocks(pattern, grid)
    keys = ((blocks < last) * size + (blocks == last) * tail).sum(-1)  # (heads or 1, query_blocks)
    rows = grid.query_blocks(size)
    first = (rows * size).clamp(min=grid.offset)
    end = (rows * size + size).clamp(max=grid.key_length)
    if grid.is_causal:
        own = (end - rows * size).clamp(
            min=0
        )  # keys of the diagonal block that the block's last query sees
        behind = keys - torch.where(rows == last, tail, size) * (rows >= 0)
        count = (end - first) * behind + (
            own * (own + 1) - (first - rows * size) * (first - rows * size + 1)
        ) // 2 * (rows >= 0)
    else:
        count = (end - first) * torch.where(pattern.sees_all(grid), grid.key_length, keys)
    return computed, int(count.sum()) * (grid.heads // blocks.shape[0])


def in_tiles(engine: SoftmaxReference, pattern: BlockPattern, call: Call) -> Tensor:
    """A·v for a block pattern, in the memory of `tiles`."""
    grid, key_mask, laid_out = grid_of(call), call.key_mask, LaidOut.of(pattern, call)
    found, size = runs(pattern, grid), laid_out.size
    ahead, spare = laid_out.ahead, laid_out.spare
    filled = key_mask
    if key_mask is None and any(run.tail for run in found):
        filled = torch.ones(1, grid.key_length, dtype=torch.bool)
    key_cap = None
    if filled is not None:
        key_cap = tiles.cap(torch.nn.functional.pad(filled, (0, spare)), call.q)

    frame = call.frame()  # what `compute` holds is freed late

    def compute(q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None) -> Tensor:
        real = frame(q, k[:, :, : grid.key_length], v[:, :, : grid.key_length])
        return _head_by_head(engine, real, LaidOut(q, k, v, size, ahead, spare), blocks, found)

    pieces = partial(_pieces, pattern.block_size, grid, found)
    blocks = sorted_key_blocks(pattern, grid)
    q, k, v = laid_out.q, laid_out.k, laid_out.v
    return laid_out.rows(tiles.attend(engine, q, k, v, key_cap, blocks, pieces, compute), call)


def in_gathered(engine: SoftmaxReference, pattern: BlockPattern, call: Call) -> Tensor:
    """A·v for a block pattern by SDPA on gathered blocks of keys."""
    laid_out, grid = LaidOut.of(pattern, call), grid_of(call)
    blocks, found = sorted_key_blocks(pattern, grid), runs(pattern, grid)
    return laid_out.rows(_head_by_head(engine, call, laid_out, blocks, found), call)


@dataclass(frozen=True)
class LaidOut:
    """q, k and v in whole blocks, (batch, heads, whole blocks of positions, head_dim).

    size: positions of a block. ahead: empty rows before the first query of its block. spare: empty
    slots at the end.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    size: int
    ahead: int
    spare: int

    @classmethod
    def of(cls, pattern: BlockPattern, call: Call) -> LaidOut:
        grid, size = grid_of(call), pattern.block_size
        ahead, spare = grid.offset % size, -grid.key_length % size
        k, v = (_pad(x, 0, spare) for x in (call.k, call.v))
        return cls(_pad(call.q, ahead, spare), k, v, size, ahead, spare)

    def rows(self, out: Tensor, call: Call) -> Tensor:
        """The rows of the call's queries."""
        return out[:, :, self.ahead : self.ahead + int(call.query_length)]


def in_tables_of_samples(engine: SoftmaxReference, pattern: BlockPattern, call: Call) -> Tensor:
    """A·v where samples end at different slots, and with them their blocks: every sample has a
    table of its own."""
    assert call.key_mask is not None
    grid, size, laid_out = grid_of(call), pattern.block_size, LaidOut.of(pattern, call)
    padded = PaddedGrid(**vars(grid), length=ends(call.key_mask))
    key_mask = torch.nn.functional.pad(call.key_mask, (0, laid_out.spare)).unflatten(1, (-1, size))
    table = sorted_key_blocks(pattern, padded)  # (batch, heads or 1, query_blocks, width)
    listed = table < key_mask.shape[1]
    table = table.where(listed, 0)
    # Not len(table): a trace serves any batch.
    samples = torch.arange(table.shape[0], device=table.device)[:, None, None]

    def rows() -> Iterator[Tensor]:
        keys, values = (x.unflatten(2, (-1, size)).unbind(1) for x in (laid_out.k, laid_out.v))
        for head, queries in enumerate(laid_out.q.unflatten(2, (-1, size)).unbind(1)):
            chosen, some = table[:, head % table.shape[1]], listed[:, head % table.shape[1]]
            seen = (key_mask[samples, chosen] & some[..., None]).flatten(2)[:, :, None]
            own_k, own_v = (
                x[head // call.group][samples, chosen].flatten(2, 3) for x in (keys, values)
            )
            yield sdpa(engine, queries, own_k, own_v, seen).flatten(1, 2)[:, None]

    out = laid_out.rows(join(rows(), call.q.shape[1], 1), call)
    return _with_rows_that_see_all(engine, pattern, call, out, padded)


def _with_rows_that_see_all(
    engine: SoftmaxReference, pattern: BlockPattern, call: Call, out: Tensor, grid: PaddedGrid
) -> Tensor:
    """`out` with the rows of blocks that see every key made anew."""
    assert call.key_mask is not None
    blocks = torch.arange(grid.offset, grid.key_length, device=out.device) // pattern.block_size
    mask = pattern.sees_all(grid)[:, 0, blocks - grid.offset // pattern.block_size]
    count = min(pattern.most_blocks * pattern.block_size, grid.query_length)
    rows = slots_of(mask, count)
    made = sdpa(engine, fetched(call.q, rows), call.k, call.v, call.key_mask[:, None, None])
    made = torch.where(mask.gather(1, rows)[:, None, :, None], made, fetched(out, rows))
    return out.scatter(2, rows[:, None, :, None].expand_as(made), made)


@dataclass(frozen=True)
class Gathered:
    """Consecutive blocks of rows, from row `first` on, with the blocks of keys that `chosen` lists
    for one after the other."""

    first: int
    shape: tuple[int, int, int]
    chosen: Tensor
    caps: tuple[tiles.Cap, ...]

    def rows(self, x: Tensor) -> Tensor:
        parts, size, _ = self.shape
        return x.narrow(0, self.first, parts * size).view(parts, size, x.shape[1])

    def keys(self, x: Tensor, name: str, memory: tiles.Memory) -> Tensor:
        parts, size, keys = self.shape
        fetched = memory(name, len(self.chosen), size, x.shape[1])
        torch.index_select(x.view(-1, size, x.shape[1]), 0, self.chosen, out=fetched)
        return fetched.view(parts, keys, x.shape[1])

    def add(self, gradient: Tensor, total: Tensor) -> None:
        size, width = self.shape[1], total.shape[1]
        total.view(-1, size, width).index_add_(0, self.chosen, gradient.view(-1, size, width))


def _pieces(
    size: int, grid: Grid, found: list[Run], q: Tensor, blocks: Tensor | None
) -> list[list[tiles.Piece]]:
    """Every head's pieces; heads that draw nothing of their own share theirs."""
    assert blocks is not None
    diagonal = tiles.cap(torch.ones(size, size, dtype=torch.bool).tril(), q)

    def of_head(blocks: Tensor) -> Iterator[tiles.Piece]:
        for run in found:
            keys = grid.key_length if run.sees_all else run.width * size
            caps = (tiles.Cap(keys - size, keys, diagonal),) if grid.is_causal and keys else ()
            together = tiles.parts_at_a_time(size, max(1, keys), 1 if run.sees_all else None)
            for start in range(run.first, run.end, together):
                end = min(start + together, run.end)
                if run.sees_all or not keys:
                    yield tiles.Slices(start * size, (1, (end - start) * size, keys), 0)
                else:
                    yield Gathered(
                        start * size,
                        (end - start, size, keys),
                        blocks[start:end, : run.width].flatten(),
                        caps,
                    )

    pieces = [list(of_head(own)) for own in blocks]
    return pieces if len(pieces) == grid.heads else pieces * grid.heads


def _head_by_head(
    engine: SoftmaxReference, call: Call, laid_out: LaidOut, blocks: Tensor, found: list[Run]
) -> Tensor:
    q, k, v = (x.unflatten(2, (-1, laid_out.size)) for x in (laid_out.q, laid_out.k, laid_out.v))

    def rows() -> Iterator[Tensor]:
        # Not k[:, head]: the gradient of that is as large as k, once for every head.
        keys, values = k.unbind(1), v.unbind(1)
        for head, queries in enumerate(q.unbind(1)):
            kv_head, own = head // call.group, blocks[head % blocks.shape[0]]
            parts = queries.split([run.end - run.first for run in found], 1)
            for run, part in zip(found, parts, strict=True):
                if run.sees_all:
                    yield _attend_to_all(engine, part, call, kv_head)
                else:
                    yield from _gathered(
                        engine, run, part, keys[kv_head], values[kv_head], own, call
                    )

    heads, query_blocks = q.shape[1:3]
    out = join(rows(), heads * query_blocks, 1)
    return out.unflatten(1, (heads, query_blocks)).flatten(2, 3)


def _pad(x: Tensor, before: int, after: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, before, after)) if before or after else x


def _attend_to_all(engine: SoftmaxReference, q: Tensor, call: Call, kv_head: int) -> Tensor:
    """Query blocks of one head, (batch, blocks, block_size, head_dim), that see every key."""
    mask = None if call.key_mask is None else call.key_mask[:, None, None, :]
    one = slice(kv_head, kv_head + 1)
    return sdpa(engine, q.flatten(1, 2)[:, None], call.k[:, one], call.v[:, one], mask)[
        :, 0
    ].unflatten(1, q.shape[1:3])


def _gathered(
    engine: SoftmaxReference, run: Run, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, call: Call
) -> Iterator[Tensor]:
    """One run of one head, (batch, blocks, block_size, head_dim) each; a few query blocks at a time
    where no gradient will be asked for, so that their keys are still in cache when they are
    read."""
    if run.width == 0:
        yield q.new_zeros(*q.shape[:3], v.shape[3])
        return
    size = q.shape[2]
    spare = k.shape[1] * size - int(call.key_length)  # empty slots of the last key block
    rows = run.end - run.first
    together = (
        rows
        if torch.is_grad_enabled()
        else at_a_time(rows, run.width * size * k.shape[3], GATHERED, q)
    )
    for start in range(0, rows, together):
        chosen = blocks[run.first + start : min(run.first + start + together, run.end), : run.width]
        keys, values, mask = (
            _gather(k, chosen),
            _gather(v, chosen),
            _mask(run, chosen, call, size, spare),
        )
        yield sdpa(
            engine,
            q[:, start : start + together],
            keys,
            values,
            mask,
            every_row_sees=call.key_mask is None,
        )


def _gather(x: Tensor, chosen: Tensor) -> Tensor:
    """(batch, key_blocks, block_size, d) and (rows, width) -> (batch, rows, width · block_size,
    d)."""
    return x.index_select(1, chosen.flatten()).unflatten(1, chosen.shape).flatten(2, 3)


def _mask(run: Run, chosen: Tensor, call: Call, size: int, spare: int) -> Tensor | None:
    """What the blocks alone do not settle: padding, causality inside the last (diagonal) block, a
    ragged end."""
    mask = None
    if call.is_causal:
        column = torch.arange(run.width * size, device=chosen.device) - (run.width - 1) * size
        mask = (column <= torch.arange(size, device=chosen.device)[:, None])[None, None]
    padded = call.key_mask
    if padded is None and run.tail:
        padded = torch.ones(
            call.q.shape[0], call.key_length, dtype=torch.bool, device=chosen.device
        )
    if padded is not None:
        padded = torch.nn.functional.pad(padded, (0, spare)).unflatten(1, (-1, size))
        padded = padded[:, chosen].flatten(2, 3)[:, :, None, :]
        mask = padded if mask is None else mask & padded
    return mask
