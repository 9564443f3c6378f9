"""Backend `blocks`: the key blocks that a query block sees are gathered side by side, and a run of
query blocks with equally many distinct key blocks is one SDPA call, which needs no mask
for the pattern."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.piece_by_piece import at_a_time, join
from attnzoo.engines.softmax.distance_bias import bias_between, bias_of_rows
from attnzoo.engines.softmax.reference import SoftmaxReference
from attnzoo.engines.softmax.rows import attend_rows
from attnzoo.engines.sparse.blocks.block_layout import (
    LaidOut,
    Run,
    positions_in,
    runs,
    sorted_key_blocks,
)
from attnzoo.engines.sparse.patterns.block_patterns import BlockPattern
from attnzoo.engines.sparse.patterns.grid import grid_of

GATHERED = 2**18  # numbers of k that are gathered at a time: with as many of v they stay in cache


def in_gathered(engine: SoftmaxReference, pattern: BlockPattern, call: Call) -> Tensor:
    """A·v for a block pattern, by SDPA on the key blocks that each query block sees.

    engine: gives scale, dropout and softcap
    pattern: which key blocks each query block sees, the same for all samples
    call: the whole call

    Returns (batch, heads, query_length, value_dim).
    """
    laid_out, grid = LaidOut.of(pattern, call), grid_of(call)
    blocks, found = sorted_key_blocks(pattern, grid), runs(pattern, grid)
    return laid_out.rows(head_by_head(engine, call, laid_out, blocks, found), call)


def head_by_head(
    engine: SoftmaxReference, call: Call, laid_out: LaidOut, blocks: Tensor, found: list[Run]
) -> Tensor:
    """A·v of whole blocks of rows, (batch, heads, query_blocks · size, value_dim).

    engine: gives scale, dropout and softcap
    call: the whole call
    laid_out: its q, k and v in whole blocks
    blocks: (heads or 1, query_blocks, width), the key blocks of each query block
    found: the query blocks in runs
    """
    q, k, v = (x.unflatten(2, (-1, laid_out.size)) for x in (laid_out.q, laid_out.k, laid_out.v))
    table = call.get("distance_bias")
    numbers = torch.arange(q.shape[2], device=q.device) + laid_out.first_block(call)

    def rows() -> Iterator[Tensor]:
        # Not k[:, head]: the gradient of that is as large as k, once for every head.
        keys, values = k.unbind(1), v.unbind(1)
        for head, queries in enumerate(q.unbind(1)):
            kv_head, own = head // call.group, blocks[head % blocks.shape[0]]
            parts = queries.split([run.end - run.first for run in found], 1)
            bias = None if table is None else table[head : head + 1]
            for run, part in zip(found, parts, strict=True):
                numbered = numbers[run.first : run.end]
                if run.sees_all:
                    yield _attend_to_all(engine, part, call, kv_head, bias, numbered)
                else:
                    yield from _gathered(
                        engine, run, part, keys[kv_head], values[kv_head], own, call, bias, numbered
                    )

    heads, query_blocks = q.shape[1:3]
    out = join(rows(), heads * query_blocks, 1)
    return out.unflatten(1, (heads, query_blocks)).flatten(2, 3)


def _attend_to_all(
    engine: SoftmaxReference,
    q: Tensor,
    call: Call,
    kv_head: int,
    bias: Tensor | None,
    numbers: Tensor,
) -> Tensor:
    """A·v of query blocks of one head that see every key, shaped as q.

    q: (batch, query_blocks, size, head_dim)
    bias, numbers: as in `_gathered`
    """
    mask = None if call.key_mask is None else call.key_mask[:, None, None, :]
    if bias is not None:
        rows = positions_in(numbers, q.shape[2]).flatten()
        bias = bias_of_rows(bias, rows[None], call)
    k, v = (x[:, kv_head : kv_head + 1] for x in (call.k, call.v))
    out = attend_rows(engine, q.flatten(1, 2)[:, None], k, v, mask, None, bias)
    return out[:, 0].unflatten(1, q.shape[1:3])


def _gathered(
    engine: SoftmaxReference,
    run: Run,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    call: Call,
    bias: Tensor | None,
    numbers: Tensor,
) -> Iterator[Tensor]:
    """A·v of a run of one head, (batch, query_blocks, size, value_dim) each. Where no gradient will
    be asked for, a few query blocks at a time, so that their keys are still in cache when they are
    read.

    q: (batch, query_blocks of the run, size, head_dim)
    k, v: (batch, key_blocks, size, d)
    blocks: (query_blocks, width), the key blocks of each query block of the head
    bias: (1, 2 · reach + 1), what distances add to the scores of the head; None: nothing
    numbers: (query_blocks of the run,), where these blocks stand
    """
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
        added = None
        if bias is not None:
            rows_of = positions_in(numbers[start : start + together], size)[..., None]
            added = bias_between(bias, rows_of, positions_in(chosen, size).flatten(1)[:, None])
        some, every_row_sees = q[:, start : start + together], call.key_mask is None
        yield attend_rows(
            engine, some, keys, values, mask, None, added, every_row_sees=every_row_sees
        )


def _gather(x: Tensor, chosen: Tensor) -> Tensor:
    """The chosen blocks side by side, (batch, rows, width · size, d).

    x: (batch, key_blocks, size, d)
    chosen: (rows, width)
    """
    return x.index_select(1, chosen.flatten()).unflatten(1, chosen.shape).flatten(2, 3)


def _mask(run: Run, chosen: Tensor, call: Call, size: int, spare: int) -> Tensor | None:
    """Which keys of its chosen blocks each row sees, broadcastable to (batch, rows, size,
    width · size) bool, where the blocks alone do not say it: padding, causality inside the last
    (diagonal) block, a ragged end. None where all are seen.

    chosen: (rows, width), key blocks
    spare: empty slots of the last key block
    """
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
