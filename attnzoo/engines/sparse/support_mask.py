"""Softmax on a support by torch's SDPA under a dense mask: quadratic in the length, and the fastest
way on short inputs."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import can_look, unrecorded
from attnzoo.engines.softmax.reference import additive, causal_mask, visible
from attnzoo.engines.softmax.sdpa import additive_mask, sdpa
from attnzoo.engines.sparse.patterns.block_patterns import BlockPattern
from attnzoo.engines.sparse.patterns.grid import Grid, PaddedGrid, grid_of
from attnzoo.engines.sparse.patterns.pattern import Pattern
from attnzoo.engines.sparse.reference import SparseReference
from attnzoo.sequences.padding import ends


def attend_supported(engine: Any, call: Call) -> Tensor:
    """A·v of softmax on a support, (batch, heads, query_length, value_dim).

    engine: a softmax engine whose `support(call)` says which keys each query sees before the call's
        masks and causality hide some, bool, broadcastable to (batch, heads, query_length,
        key_length)
    """
    seen, support = visible(call), engine.support(call)
    seen = support if seen is None else support & seen
    return sdpa(engine, call.q, call.k, call.v, seen, additive(call))


def attend_pattern(engine: SparseReference, call: Call) -> Tensor:
    """As `attend_supported`, where the support is the engine's pattern: a mask of it is kept, and
    serves every call of these sizes."""
    pattern, grid, bias = engine.pattern, grid_of(call), additive(call)
    sizes_alone = call.q.is_meta and call.key_mask is None and not torch.compiler.is_compiling()
    tied = pattern.tied_to_end and not grid.is_causal and call.key_mask is not None
    if not (sizes_alone or (can_look(call.q, may_stall=True) and pattern.is_fixed(call))) or (
        tied and not isinstance(pattern, BlockPattern)
    ):
        return attend_supported(engine, call)
    kept = None if tied else _hidden(pattern, grid, call.q.dtype)
    if call.key_mask is not None and (kept is None or kept.shape[1] > 1):
        return _sample_by_sample(engine, call, grid, kept)
    assert kept is not None
    for one in (call.key_mask, bias):
        if one is not None:
            kept = kept + (one if one is bias else additive_mask(one[:, None, None], kept))
    return sdpa(engine, call.q, call.k, call.v, None, kept)


def _sample_by_sample(
    engine: SparseReference, call: Call, grid: Grid, kept: Tensor | None
) -> Tensor:
    """As `attend_pattern`, of padded samples: a mask of all samples, heads, queries and keys would
    take longer to write than the scores. Padding at the end is cut off.

    kept: what is added to every sample's scores; None: a sample's last token says what
    """
    assert call.key_mask is not None
    lengths, counts = ends(call.key_mask).tolist(), call.key_mask.sum(1).tolist()
    bias, rows = additive(call), []
    for sample, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        one, keys = slice(sample, sample + 1), slice(0, length)
        if kept is None:
            assert isinstance(engine.pattern, BlockPattern)
            table = _hidden_blocks(engine.pattern, grid, length, call.q.dtype)
            hidden = engine.pattern.spread(table, grid)[..., keys]
        else:
            hidden = kept[..., keys]
        if count < length:
            hidden = hidden + additive_mask(call.key_mask[one, None, None, keys], hidden)
        if bias is not None:
            hidden = hidden + bias[one if len(bias) > 1 else slice(None), ..., keys]
        q, k, v = call.q[one], call.k[one, :, keys], call.v[one, :, keys]
        rows.append(sdpa(engine, q, k, v, None, hidden))
    return torch.cat(rows)


def _hidden(pattern: Pattern, grid: Grid, dtype: torch.dtype) -> Tensor:
    """What is added to scores to hide what the pattern and causality hide, (1, heads or 1,
    query_length, key_length): 0 where a key is visible, -inf elsewhere."""
    if not isinstance(pattern, BlockPattern):
        return _hidden_pairs(pattern, grid, dtype)
    if grid.query_length > 1:  # each head has blocks of its own: what is kept is their table
        hidden = pattern.spread(_hidden_blocks(pattern, grid, grid.key_length, dtype), grid)
        return hidden + _future(grid, dtype) if grid.is_causal else hidden
    # A step of decoding: the steps of one block share a table.
    whole = replace(grid, key_length=grid.num_key_blocks(pattern.block_size) * pattern.block_size)
    return pattern.spread(_hidden_blocks(pattern, whole, whole.key_length, dtype), grid)


@lru_cache(maxsize=8)
def _future(grid: Grid, dtype: torch.dtype) -> Tensor:
    """-inf where a key is behind the query, (query_length, key_length)."""
    with unrecorded(), torch.inference_mode(False):
        seen = causal_mask(grid.query_length, grid.key_length, torch.device(grid.device or "cpu"))
        return additive_mask(seen, torch.empty((), dtype=dtype))


@lru_cache(maxsize=8)
def _hidden_pairs(pattern: Pattern, grid: Grid, dtype: torch.dtype) -> Tensor:
    with unrecorded(), torch.inference_mode(False):
        seen = pattern.mask(grid)
        if grid.is_causal:
            seen = seen & causal_mask(grid.query_length, grid.key_length, seen.device)
        return additive_mask(seen, torch.empty((), dtype=dtype))[None]


def _hidden_blocks(pattern: BlockPattern, grid: Grid, length: int, dtype: torch.dtype) -> Tensor:
    """As `_hidden`, in blocks, (1, heads or 1, query_blocks, key_blocks), of a sample whose last
    token is the length-th; causality is not among it."""
    return _table(pattern, grid, -(-length // pattern.block_size), dtype)


@lru_cache(maxsize=256)
def _table(pattern: BlockPattern, grid: Grid, blocks: int, dtype: torch.dtype) -> Tensor:
    with unrecorded(), torch.inference_mode(False):
        length = torch.tensor([blocks * pattern.block_size], device=grid.device)
        seen = pattern.seen_blocks(PaddedGrid(**vars(grid), length=length))
        return additive_mask(seen, torch.empty((), dtype=dtype))
