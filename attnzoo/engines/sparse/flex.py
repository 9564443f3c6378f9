"""Sparse attention by FlexAttention (CUDA): one fused kernel that walks a table of key blocks per
query block.

The tables come from the pattern's own blocks, (n / block)² entries a head and never n × n. Of what
they list, whole blocks need no mask; the others ask `mask_mod`: causality, a window's edge,
padding. Has not run on a GPU yet.
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
from attnzoo.engines.sparse import dilated
from attnzoo.engines.sparse.patterns import BlockPattern, Grid, Pattern, Window, grid_of

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from attnzoo.engines.softmax.softmax import Softmax
    from attnzoo.engines.sparse.sparse import Sparse

BLOCK = 128  # of a window, and what FlexAttention's kernels are tuned for
SMALLEST_BLOCK = 32  # that its backward kernels have a configuration for
FLOAT32_TILE = 32  # its products are made without tensor cores, from registers
SHAPE_CLASSES = (
    64  # graphs kept: dtype, causality, padding, gradients, heads and head_dim; lengths are dynamic
)


def attend(
    engine: Softmax, pattern: Pattern, call: Call, grid: Grid, flex: Callable[..., Any]
) -> Tensor:
    """A·v by `flex`, FlexAttention compiled or not."""
    if isinstance(pattern, Window) and pattern.dilation != 1:
        return dilated.attend(
            pattern, call, lambda window, part: attend(engine, window, part, grid_of(part), flex)
        )
    ahead = rows_ahead(pattern, grid)
    q = torch.nn.functional.pad(call.q, (0, 0, ahead, 0)) if ahead else call.q
    mask = block_mask(pattern, call, grid)
    grouped, options = bool(q.shape[1] != call.k.shape[1]), kernel_options(pattern, call)
    out = flex(
        q,
        call.k,
        call.v,
        block_mask=mask,
        scale=engine.scale,
        enable_gqa=grouped,
        kernel_options=options,
    )
    return out[:, :, ahead:]


def kernel_options(pattern: Pattern, call: Call) -> dict[str, int] | None:
    """The forward tiles where FlexAttention's own do not serve: they are sizes for blocks of 128.
    Compiled for sm_90a, the kernel spills registers (kilobytes a thread) in float32, and in two
    bytes a number at 128 by 128 under a key_mask; at head_dim 64 these spill none."""
    tile = largest_tile(block_size_of(pattern))
    if call.q.dtype == torch.float32:
        tile = min(tile, FLOAT32_TILE)
    if tile < BLOCK:
        return {"fwd_BLOCK_M": tile, "fwd_BLOCK_N": tile}
    return {"fwd_BLOCK_N": 64} if call.key_mask is not None and call.q.shape[3] <= 64 else None


def block_size_of(pattern: Pattern) -> int:
    """Positions in a block of the table: the pattern's own, or BLOCK for a window."""
    return pattern.block_size if isinstance(pattern, BlockPattern) else BLOCK


def largest_tile(block_size: int) -> int:
    """The largest power of two up to BLOCK that divides block_size."""
    return min(block_size & -block_size, BLOCK)


def rows_ahead(pattern: Pattern, grid: Grid) -> int:
    """Empty rows before the first query, so that blocks of rows are blocks of positions. A window
    is the same wherever its blocks begin."""
    return grid.offset % pattern.block_size if isinstance(pattern, BlockPattern) else 0


def block_mask(pattern: Pattern, call: Call, grid: Grid) -> BlockMask:
    """What FlexAttention needs to know of the support: tables of blocks, and `mask_mod` inside
    those that are not whole."""
    mask = copy(_tables(pattern, grid, call.key_mask is not None))
    first = torch.full((), grid.offset - rows_ahead(pattern, grid), device=call.q.device)
    window = (
        torch.full((), pattern.window, device=call.q.device)
        if isinstance(pattern, Window)
        else None
    )
    mask.mask_mod = _mask_mod(first, window, call.key_mask, is_causal=grid.is_causal)
    return mask


def _mask_mod(
    first: Tensor, window: Tensor | None, key_mask: Tensor | None, *, is_causal: bool
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """first: position of row 0. Numbers are tensors, since a graph would be compiled anew for
    each."""

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
def _tables(pattern: Pattern, grid: Grid, padded: bool) -> BlockMask:
    """Tables for one pattern and size, kept for the next call: up to heads · (n / block)² · 16
    bytes each."""
    from torch.nn.attention.flex_attention import BlockMask

    seen, whole = (
        blocks_of_window(pattern, grid)
        if isinstance(pattern, Window)
        else blocks_of_pattern(pattern, grid)
    )
    if padded:  # any block may hold a padded key
        whole = torch.zeros_like(whole)
    partial = _ordered(seen & ~whole)
    full = (None, None) if padded else _ordered(whole)
    lengths = (rows_ahead(pattern, grid) + grid.query_length, grid.key_length)
    return BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=block_size_of(pattern), seq_lengths=lengths
    )


def _ordered(table: Tensor) -> tuple[Tensor, Tensor]:
    """(1, heads or 1, rows) counts and (1, heads or 1, rows, key_blocks) indices, those that count
    first."""
    table = table[None].int()
    return table.sum(-1).int(), table.argsort(dim=-1, descending=True, stable=True).int()


def blocks_of_window(pattern: Window, grid: Grid) -> tuple[Tensor, Tensor]:
    """Blocks that a window touches, and those that lie inside it for every row, both (1,
    query_blocks, key_blocks) bool."""
    first_row = torch.arange(grid.offset, grid.key_length, BLOCK, device=grid.device)[:, None]
    first_key = torch.arange(0, grid.key_length, BLOCK, device=grid.device)
    last_row, last_key = (
        (x + BLOCK - 1).clamp(max=grid.key_length - 1) for x in (first_row, first_key)
    )
    nearest, farthest = (
        first_row - last_key,
        last_row - first_key,
    )  # the least and the largest distance i - j in a block
    least = 0 if grid.is_causal else 1 - pattern.window
    seen = (farthest >= least) & (nearest < pattern.window)
    whole = (
        (nearest >= least) & (farthest < pattern.window) & (first_key + BLOCK <= grid.key_length)
    )
    return seen[None], whole[None]


def blocks_of_pattern(pattern: Pattern, grid: Grid) -> tuple[Tensor, Tensor]:
    """As `blocks_of_window`, (heads or 1, query_blocks, key_blocks)."""
    assert isinstance(pattern, BlockPattern)
    seen = pattern.seen_blocks(grid)
    keys = torch.arange(seen.shape[2], device=grid.device)
    inside = (keys + 1) * pattern.block_size <= grid.key_length
    if not grid.is_causal:
        return seen, seen & inside
    rows = grid.query_blocks(pattern.block_size)[:, None]
    return seen & (keys <= rows), seen & (keys < rows) & inside


def run(engine: Sparse, call: Call) -> Tensor:
    """A·v by FlexAttention, compiled."""
    return attend(
        engine, engine.pattern, call, grid_of(call), _compiled(call, block_size_of(engine.pattern))
    )


def _compiled(call: Call, block_size: int) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    if torch.compiler.is_compiling():
        return flex_attention
    # Without tuning the backward pass has one configuration, in tiles of up to 128, and fails on
    # smaller blocks.
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v))
    return compiled_flex(learns and largest_tile(block_size) < BLOCK)


@lru_cache(maxsize=2)
def compiled_flex(tuned: bool) -> Callable[..., Any]:
    """FlexAttention compiled for any length. More shape classes than SHAPE_CLASSES are an error,
    never a fall back to n × n scores."""
    import torch._dynamo  # pyright: ignore[reportUnusedImport]
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(
        flex_attention,
        dynamic=True,
        fullgraph=True,
        options={"max_autotune": True} if tuned else None,
    )
    return torch._dynamo.config.patch(recompile_limit=SHAPE_CLASSES)(compiled)


def why_not(engine: Sparse, call: Call) -> str | None:
    """Why this backend refuses the call, from static facts only; None when it takes it."""
    if call.q.device.type != "cuda":
        return f"FlexAttention needs tensors on a CUDA device, got {call.q.device.type}"
    if not isinstance(engine.pattern, Window | BlockPattern):
        return f"the pattern {type(engine.pattern).__name__} has no layout in blocks"
    if isinstance(engine.pattern, Window) and (
        engine.pattern.sinks or "sink_logits" in call.inputs
    ):
        return "its tables have no sinks, and its softmax no sink logits"
    if engine.pattern.tied_to_end and call.key_mask is not None and not call.is_causal:
        return "its tables know one end, and padded samples have their own"
    if call.q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"FlexAttention has no {call.q.dtype} kernel: use float16, bfloat16 or float32"
    if engine.training and engine.dropout > 0:
        return (
            f"FlexAttention has no dropout, and this attention trains with dropout={engine.dropout}"
        )
    if block_size_of(engine.pattern) % SMALLEST_BLOCK:
        return (
            f"block_size={block_size_of(engine.pattern)} must be a multiple of {SMALLEST_BLOCK} "
            "for FlexAttention"
        )
    if min(call.q.shape[3], call.v.shape[3]) < 16:
        return (
            f"head_dim={call.q.shape[3]} and value_dim={call.v.shape[3]} must be at least 16 for "
            "FlexAttention"
        )
    rows = BLOCK * (max(engine.pattern.dilations) if isinstance(engine.pattern, Window) else 1)
    if call.query_length < rows:
        return (
            f"query_length={call.query_length} is below {rows}, which fill one block of {BLOCK} "
            "queries: its tables would cost more than they save"
        )
    return missing("triton", "it comes with the CUDA builds of torch")
