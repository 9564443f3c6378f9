"""Sparse attention by an exact softmax over every key: where the pattern hides none, and on short
inputs under a mask of what it hides."""

from __future__ import annotations

from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.softmax.reference import causal_mask
from attnzoo.engines.softmax.sdpa import attend as attend_whole
from attnzoo.engines.softmax.sdpa import cannot as whole_cannot
from attnzoo.engines.softmax.sdpa import sdpa
from attnzoo.engines.sparse.patterns.grid import Grid, grid_of
from attnzoo.engines.sparse.patterns.pattern import Pattern
from attnzoo.engines.sparse.reference import SparseReference
from attnzoo.engines.sparse.support_mask import attend_pattern
from attnzoo.sequences.padding import fills_slots

LARGEST_MASK = 2**22  # entries of a mask that holds causality and padding together


def attend(engine: SparseReference, call: Call) -> Tensor:
    """A·v by one call of torch's SDPA over every key."""
    grid = grid_of(call)
    if not is_whole(engine.pattern, grid) or _ends_differ(engine, call):
        return attend_pattern(engine, call)
    if "distance_bias" in call.inputs:
        return attend_whole(engine, call)
    is_causal = False  # not one expression, as in `sdpa.attend`
    if grid.is_causal and grid.query_length > 1:
        is_causal = True
    if call.key_mask is None:
        return sdpa(engine, call.q, call.k, call.v, is_causal=is_causal)
    mask = call.key_mask[:, None, None]
    if is_causal:
        mask = mask & causal_mask(grid.query_length, grid.key_length, mask.device)
    return sdpa(engine, call.q, call.k, call.v, mask)


def why_not(engine: SparseReference, call: Call) -> str | None:
    """Why this backend refuses the call; None when it takes it."""
    grid = grid_of(call)
    hides = not is_whole(engine.pattern, grid) or _ends_differ(engine, call)
    if hides and not engine.is_short(grid):
        return "the pattern hides keys, and a dense mask of them is quadratic in the length"
    return cannot(engine, call)


def cannot(engine: SparseReference, call: Call) -> str | None:
    """Why SDPA does not take the call, whatever the pattern hides; None when it does."""
    if "sink_logits" in call.inputs:
        return "SDPA has no place for sink_logits"
    return whole_cannot(engine, call) or too_large(call)


def _ends_differ(engine: SparseReference, call: Call) -> bool:
    """Whether samples may begin or end at different slots, and the pattern counts from both."""
    tied = engine.pattern.tied_to_end and not call.is_causal
    return tied and not fills_slots(call.key_mask)


def too_large(call: Call) -> str | None:
    """Why no mask holds causality and padding together; None where one does, or none is needed."""
    if call.key_mask is None or not call.is_causal or call.query_length == 1:
        return None
    entries = call.key_mask.numel() * call.query_length
    if entries <= LARGEST_MASK:
        return None
    return f"a mask of causality and padding has {entries} entries, over {LARGEST_MASK}"


def is_whole(pattern: Pattern, grid: Grid) -> bool:
    """Whether exact attention gives the same as the pattern.

    It does where the pattern hides no key, and where a causal call has as many queries as keys or
    just one query, since torch's own causality serves no other.

    pattern: which keys each query sees
    grid: the sizes of the call
    """
    return pattern.hides_nothing(grid) and (
        not grid.is_causal or grid.query_length in (1, grid.key_length)
    )
