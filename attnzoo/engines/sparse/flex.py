"""Sparse attention by torch's FlexAttention (CUDA).

One fused kernel goes through a table that lists, for each block of queries, the blocks of keys that
it sees. The tables come from the pattern's own blocks, and have (n / block)² entries a head for a
length of n, never n². In a block that is visible as a whole the kernel needs no mask; in the others
it asks a function, `mask_mod`, about each key: causality, the edge of a window, padding. This
backend has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.installed import missing
from attnzoo.engines.softmax.reference import SoftmaxReference
from attnzoo.engines.sparse.patterns.grid import Grid, grid_of
from attnzoo.engines.sparse.patterns.pattern import Pattern
from attnzoo.engines.sparse.reference import SparseReference

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # what FlexAttention's kernels are tuned for
SMALLEST_BLOCK = 32  # that its backward kernels have a configuration for
FLOAT32_TILE = 32  # float32 products run without tensor cores, and their tiles must fit registers
# How many compiled graphs are kept: one for each combination of dtype, causality, padding,
# gradients, heads and head_dim. Lengths are dynamic and need no graph of their own.
SHAPE_CLASSES = 64


def attend(engine: SoftmaxReference, pattern: Pattern, call: Call) -> Tensor:
    """A·v by compiled FlexAttention, (batch, heads, query_length, value_dim).

    engine: gives the scale
    pattern: which keys each query sees; it has a table (`Pattern.table`)
    call: one that `why_not` accepts
    """
    return attend_by(_compiled(call, block_size_of(pattern)), engine, pattern, call)


def attend_by(
    flex: Callable[..., Any], engine: SoftmaxReference, pattern: Pattern, call: Call
) -> Tensor:
    """As `attend`, by `flex`, which is FlexAttention compiled or not."""
    mask, ahead = block_mask(pattern, call)
    q = torch.nn.functional.pad(call.q, (0, 0, ahead, 0)) if ahead else call.q
    out = flex(
        q,
        call.k,
        call.v,
        block_mask=mask,
        scale=engine.scale,
        enable_gqa=bool(q.shape[1] != call.k.shape[1]),
        kernel_options=kernel_options(pattern, call),
    )
    return out[:, :, ahead:]


def block_size_of(pattern: Pattern) -> int:
    """Number of positions in a block of the pattern's table."""
    assert pattern.table_block_size is not None
    return pattern.table_block_size


def kernel_options(pattern: Pattern, call: Call) -> dict[str, int] | None:
    """The tile sizes of the forward kernel, where FlexAttention's own do not serve; None where they
    do.

    Its own are for blocks of 128. Compiled for compute capability 9.0 (sm_90a), they spill
    registers (kilobytes a thread) in float32, and in float16 and bfloat16 at 128 by 128 under a
    key_mask. The sizes given here spill none at head_dim 64.
    """
    tile = largest_tile(block_size_of(pattern))
    if call.q.dtype == torch.float32:
        tile = min(tile, FLOAT32_TILE)
    if tile < BLOCK:
        return {"fwd_BLOCK_M": tile, "fwd_BLOCK_N": tile}
    return {"fwd_BLOCK_N": 64} if call.key_mask is not None and call.q.shape[3] <= 64 else None


def largest_tile(block_size: int) -> int:
    """The largest power of two up to BLOCK that divides block_size."""
    return min(block_size & -block_size, BLOCK)


def block_mask(pattern: Pattern, call: Call) -> tuple[BlockMask, int]:
    """What FlexAttention needs to know about the visible keys of a call.

    Returns the tables of blocks, with the function `mask_mod` for blocks that are not visible as a
    whole, and how many empty rows must stand before the first query, so that blocks of rows are
    blocks of positions.
    """
    grid = grid_of(call)
    found, ahead = _tables(pattern, grid, call.key_mask is not None)
    mask = copy(found)
    first = torch.full((), grid.offset - ahead, device=call.q.device)
    farthest = pattern.farthest
    window = None if farthest is None else torch.full((), farthest, device=call.q.device)
    mask.mask_mod = _mask_mod(first, window, call.key_mask, is_causal=grid.is_causal)
    return mask, ahead


def _mask_mod(
    first: Tensor, window: Tensor | None, key_mask: Tensor | None, *, is_causal: bool
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The function that tells FlexAttention whether a row sees a key.

    first: the position of row 0, a tensor, since each new Python number would compile a new graph
    window: keys at this distance or more are hidden, also a tensor; None: no distance hides
    key_mask: (batch, key_length) bool, False in padded slots; None: no padding
    is_causal: whether keys after the row are hidden
    """

    def visible(sample: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        distance = row + first - key
        seen = key >= 0
        if is_causal:
            seen = seen & (distance >= 0)
        if window is not None:
            seen = seen & (distance.abs() < window)
        if key_mask is not None:
            seen = seen & key_mask[sample, key]
        return seen

    return visible


@lru_cache(maxsize=16)
def _tables(pattern: Pattern, grid: Grid, padded: bool) -> tuple[BlockMask, int]:
    """The tables of one pattern and size, and how many empty rows stand before the first query.

    They are kept for the next call, and take up to heads · (n / block)² · 16 bytes.

    padded: whether the call has a key_mask
    """
    from torch.nn.attention.flex_attention import BlockMask

    table = pattern.table(grid)
    # With padding no block is visible as a whole, since any may hold a padded key.
    whole = torch.zeros_like(table.whole) if padded else table.whole
    partial = _ordered(table.seen & ~whole)
    full = (None, None) if padded else _ordered(whole)
    lengths = (table.ahead + grid.query_length, grid.key_length)
    block_size = block_size_of(pattern)
    mask = BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=block_size, seq_lengths=lengths)
    return mask, table.ahead


def _ordered(table: Tensor) -> tuple[Tensor, Tensor]:
    """A table of blocks as FlexAttention takes it.

    table: (heads or 1, query_blocks, key_blocks) bool

    Returns how many key blocks each query block lists, (1, heads or 1, query_blocks), and the
    numbers of all key blocks, (1, heads or 1, query_blocks, key_blocks), the listed ones first.
    """
    table = table[None].int()
    return table.sum(-1).int(), table.argsort(dim=-1, descending=True, stable=True).int()


def _compiled(call: Call, block_size: int) -> Callable[..., Any]:
    """FlexAttention for this call, compiled unless a compiler is already at work around it."""
    from torch.nn.attention.flex_attention import flex_attention

    if torch.compiler.is_compiling():
        return flex_attention
    # Untuned, the backward kernel has one configuration, whose tiles of up to 128 fail on smaller
    # blocks; tuning searches for one that fits.
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v))
    return compiled_flex(learns and largest_tile(block_size) < BLOCK)


@lru_cache(maxsize=2)
def compiled_flex(tuned: bool) -> Callable[..., Any]:
    """FlexAttention compiled for any length. Needing more than SHAPE_CLASSES graphs is an error,
    never a silent fallback to scores for every query and key.

    tuned: whether to search for the fastest tile sizes
    """
    import torch._dynamo  # pyright: ignore[reportUnusedImport]
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(
        flex_attention,
        dynamic=True,
        fullgraph=True,
        options={"max_autotune": True} if tuned else None,
    )
    return torch._dynamo.config.patch(recompile_limit=SHAPE_CLASSES)(compiled)


def why_not(engine: SparseReference, call: Call, dilation: int = 1) -> str | None:
    """Why this backend refuses the call, from static facts only; None when it takes it.

    engine: gives the pattern, and dropout
    dilation: into how many sequences the positions of the call will be split (see windows/dilated)
    """
    if call.q.device.type != "cuda":
        return f"FlexAttention needs tensors on a CUDA device, got {call.q.device.type}"
    if call.q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"FlexAttention has no {call.q.dtype} kernel: use float16, bfloat16 or float32"
    if engine.training and engine.dropout > 0:
        return (
            f"FlexAttention has no dropout, and this attention trains with dropout={engine.dropout}"
        )
    if engine.softcap is not None or "distance_bias" in call.inputs:
        return "softcap and distance_bias are not passed on to FlexAttention"
    block_size = block_size_of(engine.pattern)
    if block_size % SMALLEST_BLOCK:
        return f"block_size={block_size} must be a multiple of {SMALLEST_BLOCK} for FlexAttention"
    if min(call.q.shape[3], call.v.shape[3]) < 16:
        return (
            f"head_dim={call.q.shape[3]} and value_dim={call.v.shape[3]} must be at least 16 for "
            "FlexAttention"
        )
    rows = BLOCK * dilation
    if call.query_length < rows:
        return (
            f"query_length={call.query_length} is below {rows}, which fill one block of {BLOCK} "
            "queries: its tables would cost more than they save"
        )
    return missing("triton", "it comes with the CUDA builds of torch")
