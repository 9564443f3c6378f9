"""Backend `native` of selected blocks: some rows at a time beside the blocks that any of them sees,
by the compiled operators of `engines/softmax/native`.

Rows of one tile often like other blocks: on long inputs, where a tile meets most blocks for the few
rows that see each, `tiles` takes less time.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.native.library import operators
from attnzoo.engines.softmax.native import attend as native
from attnzoo.engines.softmax.native.tile_plan import TilePlan
from attnzoo.engines.softmax.reference import SoftmaxReference
from attnzoo.engines.sparse.masked_tiles import attend_pattern
from attnzoo.engines.sparse.patterns.window import Window
from attnzoo.engines.sparse.selected.selected_tiles import in_open_operators
from attnzoo.engines.sparse.selected.selection import Placed, Selection

LONGEST = 2048  # keys up to which it takes less time than `tiles`


def passed_over(call: Call) -> str | None:
    """Why backend="auto" passes over it; None where it does not."""
    if call.key_length > LONGEST:
        return f"beyond {LONGEST} keys, tiles of rows that see the same block are faster"
    return native.passed_over(call)


def attend_all(engine: SoftmaxReference, call: Call) -> Tensor:
    """As `attend`, where every key is seen."""
    longest = max(call.query_length, call.key_length)
    return attend_pattern(engine, Window(longest), call)


def attend(
    engine: SoftmaxReference, placed: Placed, selection: Selection, block_size: int
) -> Tensor:
    """As `attend_selected`, of a call that `native.why_not` accepts."""
    call = placed.call
    openly = partial(in_open_operators, engine, placed, selection, block_size)

    def compute(q: Tensor, k: Tensor, v: Tensor, _: None) -> Tensor:
        return openly(q, k, v)

    given = (call.q, call.k, call.v, call.key_mask, None)
    return native.by_plan(engine, given, _plan_of(placed, selection, block_size), compute)


def _plan_of(placed: Placed, selection: Selection, block_size: int) -> TilePlan:
    call, blocks = placed.call, selection.blocks.contiguous()
    positions = placed.positions.contiguous() if call.is_causal else None
    sizes = (call.query_length, call.key_length, block_size)
    choice_of = None if selection.choice_of is None else selection.choice_of.contiguous()
    tables = operators().native_plan_of_blocks(
        blocks, choice_of, positions, call.q.new_empty(0), *sizes
    )
    plan = TilePlan(*tables)
    samples, choosers = blocks.shape[:2]
    if choosers == call.q.shape[1]:
        return plan
    of_choosers = plan.ranges.view(samples, choosers, 2)
    of_heads = of_choosers.repeat_interleave(call.q.shape[1] // choosers, 1)
    return plan._replace(ranges=of_heads.flatten(0, 1))
