"""Backend `native` of any pattern on short inputs: what `dense` computes, but for the keys that
none of some rows sees, and without a copy that hides padding."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import unrecorded
from attnzoo.engines.softmax.native import attend as native
from attnzoo.engines.softmax.native.mask_plan import plan_of_mask
from attnzoo.engines.softmax.native.tile_plan import TilePlan
from attnzoo.engines.softmax.reference import causal_mask, reference
from attnzoo.engines.sparse.patterns.grid import Grid, grid_of
from attnzoo.engines.sparse.patterns.pattern import Pattern
from attnzoo.engines.sparse.windows.window_slices import with_logits
from attnzoo.sequences.bad_slots import clear_padding


def attend(engine: Any, call: Call) -> Tensor:
    """A·v of softmax on the engine's pattern, (batch, heads, query_length, value_dim)."""
    return attend_pattern(engine, engine.pattern, call)


def attend_pattern(engine: Any, pattern: Pattern, call: Call) -> Tensor:
    """The same of a pattern that shows what the engine does, without looking at positions."""
    frame = call.frame()  # and not the call: autograd holds `compute`, which would hold its tensors

    def compute(q: Tensor, k: Tensor, v: Tensor, logits: Tensor | None) -> Tensor:
        return reference(engine, with_logits(clear_padding(frame(q, k, v)), logits))

    plan = _kept_plan(pattern, grid_of(call), call.q.dtype)
    given = (call.q, call.k, call.v, call.key_mask, call.get("sink_logits"))
    return native.by_plan(engine, given, plan, compute)


def serves(engine: Any, call: Call) -> bool:
    """Whether a call is short, and one mask serves all of its samples."""
    pattern, grid = engine.pattern, grid_of(call)
    if grid.query_length == 1 or not engine.is_short(grid):
        return False
    if call.key_mask is None:
        return True
    return (grid.is_causal or not pattern.tied_to_end) and pattern.is_fixed(call)


@lru_cache(maxsize=8)
def _kept_plan(pattern: Pattern, grid: Grid, dtype: torch.dtype) -> TilePlan:
    with unrecorded(), torch.inference_mode(False):
        seen = pattern.mask(grid)
        if grid.is_causal:
            seen = seen & causal_mask(grid.query_length, grid.key_length, seen.device)
        return plan_of_mask(seen, dtype)
