"""Backend `ragged` of blocks: samples end at different slots, and with them their blocks, so that
every sample has a table of its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.piece_by_piece import join
from attnzoo.engines.softmax.distance_bias import bias_between, bias_of_rows
from attnzoo.engines.softmax.reference import SoftmaxReference
from attnzoo.engines.softmax.rows import attend_rows
from attnzoo.engines.sparse.blocks.block_layout import LaidOut, positions_in, sorted_key_blocks
from attnzoo.engines.sparse.patterns.block_patterns import BlockPattern
from attnzoo.engines.sparse.patterns.grid import PaddedGrid, grid_of
from attnzoo.sequences.padding import ends, fetched, slots_of


def in_tables_of_samples(engine: SoftmaxReference, pattern: BlockPattern, call: Call) -> Tensor:
    """A·v for a block pattern whose samples end at different slots, by SDPA on the key blocks that
    each query block sees.

    engine: gives scale, dropout and softcap
    pattern: which key blocks each query block sees, counted from the ends of a sample
    call: the whole call, with a key_mask

    Returns (batch, heads, query_length, value_dim).
    """
    assert call.key_mask is not None
    grid, size, laid_out = grid_of(call), pattern.block_size, LaidOut.of(pattern, call)
    padded = PaddedGrid(**vars(grid), length=ends(call.key_mask))
    key_mask = torch.nn.functional.pad(call.key_mask, (0, laid_out.spare)).unflatten(1, (-1, size))
    table = sorted_key_blocks(pattern, padded)  # (batch, heads or 1, query_blocks, width)
    listed = table < key_mask.shape[1]
    table = table.where(listed, 0)
    # Not len(table): a trace serves any batch.
    samples = torch.arange(table.shape[0], device=table.device)[:, None, None]

    bias = call.get("distance_bias")
    numbers = torch.arange(table.shape[2], device=table.device) + laid_out.first_block(call)

    def rows() -> Iterator[Tensor]:
        keys, values = (x.unflatten(2, (-1, size)).unbind(1) for x in (laid_out.k, laid_out.v))
        for head, queries in enumerate(laid_out.q.unflatten(2, (-1, size)).unbind(1)):
            chosen, some = table[:, head % table.shape[1]], listed[:, head % table.shape[1]]
            seen = (key_mask[samples, chosen] & some[..., None]).flatten(2)[:, :, None]
            own_k, own_v = (
                x[head // call.group][samples, chosen].flatten(2, 3) for x in (keys, values)
            )
            added = None
            if bias is not None:
                keys_of = positions_in(chosen, size).flatten(2)[:, :, None]
                rows_of = positions_in(numbers, size)[None, ..., None]
                added = bias_between(bias[head : head + 1], rows_of, keys_of)[0]
            out = attend_rows(engine, queries, own_k, own_v, seen, None, added)
            yield out.flatten(1, 2)[:, None]

    out = laid_out.rows(join(rows(), call.q.shape[1], 1), call)
    return _with_rows_that_see_all(engine, pattern, call, out, padded)


def _with_rows_that_see_all(
    engine: SoftmaxReference, pattern: BlockPattern, call: Call, out: Tensor, grid: PaddedGrid
) -> Tensor:
    """`out` with the rows of blocks that see every key made anew.

    out: (batch, heads, query_length, value_dim)
    grid: the sizes of the call, and the end of every sample
    """
    assert call.key_mask is not None
    blocks = torch.arange(grid.offset, grid.key_length, device=out.device) // pattern.block_size
    mask = pattern.sees_all(grid)[:, 0, blocks - grid.offset // pattern.block_size]
    count = min(pattern.most_blocks * pattern.block_size, grid.query_length)
    rows = slots_of(mask, count)
    bias = call.get("distance_bias")
    bias = None if bias is None else bias_of_rows(bias, rows + call.offset, call)
    q, mask_of_keys = fetched(call.q, rows), call.key_mask[:, None, None]
    made = attend_rows(engine, q, call.k, call.v, mask_of_keys, None, bias)
    made = torch.where(mask.gather(1, rows)[:, None, :, None], made, fetched(out, rows))
    return out.scatter(2, rows[:, None, :, None].expand_as(made), made)
