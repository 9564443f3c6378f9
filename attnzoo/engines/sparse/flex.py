"""Sparse attention by torch's FlexAttention: on CUDA, and forward only on a CPU.

One fused kernel goes through a table that lists, for each block of queries, the blocks of keys that
it sees. The tables come from the pattern's own blocks, and have (n / block)² entries a head for a
length of n, never n². In a block that is visible as a whole the kernel needs no mask; in the others
it asks a function, `mask_mod`, about each key: causality, the edge of a window, padding, the pieces
of a packed row. Another, `score_mod`, changes scores: a softcap, a bias by distance. The first call
of a shape class compiles its kernels, which takes 5 to 30 seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import is_open, is_recorded
from attnzoo.engines import tried_on_gpu
from attnzoo.engines.installed import missing
from attnzoo.engines.softmax.reference import SoftmaxReference
from attnzoo.engines.sparse.flex_modifiers import mask_mod, score_mod
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
    mask, tables = block_mask(pattern, call)
    ahead = tables.ahead
    q = torch.nn.functional.pad(call.q, (0, 0, ahead, 0)) if ahead else call.q
    out = flex(
        q,
        call.k,
        call.v,
        score_mod=score_mod(tables.first, engine.softcap, call),
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
    registers (kilobytes a thread) in float32, and in float16 and bfloat16 at 128 by 128 where every
    block asks a key_mask or segments. The sizes given here spill none at head_dim 64.
    """
    if _on_cpu(call):
        return None
    tile = largest_tile(block_size_of(pattern))
    if call.q.dtype == torch.float32:
        tile = min(tile, FLOAT32_TILE)
    if tile < BLOCK:
        return {"fwd_BLOCK_M": tile, "fwd_BLOCK_N": tile}
    asks = call.key_mask is not None or call.segments is not None
    return {"fwd_BLOCK_N": 64} if asks and call.q.shape[3] <= 64 else None


def largest_tile(block_size: int) -> int:
    """The largest power of two up to BLOCK that divides block_size."""
    return min(block_size & -block_size, BLOCK)


def block_mask(pattern: Pattern, call: Call) -> tuple[BlockMask, Tables]:
    """What FlexAttention needs to know about the visible keys of a call: the tables of blocks, with
    the function `mask_mod` for blocks that are not visible as a whole, and what they are made of.
    """
    grid = grid_of(call)
    # A graph makes its own tables, since it would trace what fills a cache.
    made = _made_tables if torch.compiler.is_compiling() else _kept_tables
    # Where any block may hold padding or the end of a piece, none is visible as a whole.
    tables = made(pattern, grid, call.key_mask is None and call.segments is None)
    mask = copy(tables.mask)
    mask.mask_mod = mask_mod(tables.first, tables.window, call)
    return mask, tables


@dataclass(frozen=True)
class Tables:
    """What FlexAttention needs of one pattern and size, whatever the values of a call.

    mask: the tables of blocks
    ahead: empty rows before the first query, so that blocks of rows are blocks of positions
    first: the position of row 0, a tensor, since each new Python number would compile a new graph
    window: keys at this distance or more are hidden, also a tensor; None: no distance hides
    """

    mask: BlockMask
    ahead: int
    first: Tensor
    window: Tensor | None


@lru_cache(maxsize=16)
def _kept_tables(pattern: Pattern, grid: Grid, may_be_whole: bool) -> Tables:
    """As `_made_tables`, kept for the next call; up to heads · (n / block)² · 16 bytes each."""
    with torch.inference_mode(False):  # they may serve training later
        return _made_tables(pattern, grid, may_be_whole)


def _made_tables(pattern: Pattern, grid: Grid, may_be_whole: bool) -> Tables:
    """The tables of one pattern and size.

    may_be_whole: whether a block of which the pattern hides nothing is visible as a whole
    """
    from torch.nn.attention.flex_attention import BlockMask

    table = pattern.table(grid)
    whole = table.whole if may_be_whole else torch.zeros_like(table.whole)
    partial = _ordered(table.seen & ~whole)
    full = _ordered(whole) if may_be_whole else (None, None)
    lengths = (table.ahead + grid.query_length, grid.key_length)
    block_size = block_size_of(pattern)
    mask = BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=block_size, seq_lengths=lengths)
    first = torch.full((), grid.offset - table.ahead, device=grid.device)
    farthest = pattern.farthest
    window = None if farthest is None else torch.full((), farthest, device=grid.device)
    return Tables(mask, table.ahead, first, window)


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
    # The C++ of dynamic lengths does not compile everywhere (torch 2.13): there each has its own.
    return compiled_flex(_must_tune(call, block_size), dynamic=not _on_cpu(call))


def _must_tune(call: Call, block_size: int) -> bool:
    """Whether a backward kernel must be searched for. Untuned, it has one configuration, whose
    tiles of up to 128 fail on smaller blocks."""
    return _learns(call) and largest_tile(block_size) < BLOCK


def _on_cpu(call: Call) -> bool:
    return call.q.device.type == "cpu"


def _learns(call: Call) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, call.k, call.v))


@lru_cache(maxsize=4)
def compiled_flex(tuned: bool, dynamic: bool = True) -> Callable[..., Any]:
    """FlexAttention compiled. Needing more than SHAPE_CLASSES graphs is an error,
    never a silent fallback to scores for every query and key.

    tuned: whether to search for the fastest tile sizes
    dynamic: whether a graph serves any length
    """
    import torch._dynamo
    import torch._functorch.config as functorch_config

    compiled = torch.compile(
        _only_compiled,
        dynamic=dynamic,
        fullgraph=True,
        options={"max_autotune": True} if tuned else None,
    )
    # A backward pass that frees its buffers early would refuse a second one (retain_graph).
    kept = functorch_config.patch(donated_buffer=False)(compiled)
    return torch._dynamo.config.patch(recompile_limit=SHAPE_CLASSES)(kept)


def _only_compiled(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """FlexAttention, which reads no tables of blocks where it is not compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    if not torch.compiler.is_compiling():
        raise RuntimeError(
            "FlexAttention was to be compiled, and torch.compile is switched off: switch it on, or "
            "ask for another backend than 'flex'"
        )
    return flex_attention(q, k, v, **options)


def _compiles() -> bool:
    """Whether torch.compile is switched on, by its environment variables and by
    torch.compiler.set_stance."""
    from torch._dynamo import config, eval_frame

    switched_off = config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1"
    return not switched_off and eval_frame._stance.stance != "force_eager"


def why_not(engine: SparseReference, call: Call, dilation: int = 1) -> str | None:
    """Why this backend refuses the call, from static facts only; None when it takes it.

    engine: gives the pattern, and dropout
    dilation: into how many sequences the positions of the call will be split (see windows/dilated)
    """
    if not _on_cpu(call) and call.q.device.type != "cuda":
        return f"FlexAttention needs a CUDA device or the CPU, got {call.q.device.type}"
    if _on_cpu(call) and _learns(call):
        return "FlexAttention has no backward pass on a CPU: call it under torch.no_grad()"
    if call.q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"FlexAttention has no {call.q.dtype} kernel: use float16, bfloat16 or float32"
    if engine.training and engine.dropout > 0:
        return (
            f"FlexAttention has no dropout, and this attention trains with dropout={engine.dropout}"
        )
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
    if _on_cpu(call):
        return _unseen(call, block_size)
    return _unseen(call, block_size) or missing("triton", "it comes with the CUDA builds of torch")


def untried(engine: SparseReference, call: Call) -> str | None:
    """Why backend="auto" passes over it for a call that it takes by name; None where it does not:
    on a CPU the backends of this library are faster."""
    if _on_cpu(call):
        return "on a CPU it is slower than the backends that auto takes, and compiles at first use"
    return tried_on_gpu.untried(engine, call)


def _unseen(call: Call, block_size: int) -> str | None:
    """Why its kernel cannot be made where a graph or transform is at work; None where it can."""
    if not torch.compiler.is_compiling():
        if is_recorded() or is_open() or torch._C._are_functorch_transforms_active():
            return "a graph or transform must see the operators inside"
        return None if _compiles() else "FlexAttention must be compiled: torch.compile is off"
    if torch.compiler.is_exporting():
        return "an exported graph could not run elsewhere"
    if torch._C._are_functorch_transforms_active():
        return "FlexAttention knows no transforms of torch.func"
    if _must_tune(call, block_size):
        return (
            f"its backward kernel must be searched for where block_size={block_size} is no "
            f"multiple of {BLOCK}, which a compiled graph does not do"
        )
    return None
