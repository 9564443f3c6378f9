"""Backend `native_row` of a Fenwick tree: one token, as decoding brings it, in compiled code."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.linear.gated.tokens import HEAD_GATE, STRENGTH, Rule
from attnzoo.engines.linear.log_linear.tree import LEVELS
from attnzoo.engines.linear.log_linear.tree_state import Tree
from attnzoo.engines.linear.native import compiled_recurrence
from attnzoo.engines.native.library import in_rows, operators


def step(rule: Rule, call: Call, tree: Tree) -> tuple[Tensor, Tree]:
    """The row of a call of one token that `why_not` accepts, (batch, heads, 1, value_dim), and the
    tree behind it.

    call: with levels
    """
    dtype = accumulation_dtype(call.q.dtype)
    scale = int(call.q.shape[-1]) ** -0.5 if rule.scale is None else rule.scale
    given = (call.get(one.name) for one in (HEAD_GATE, STRENGTH))
    q, k, v = (in_rows(x.to(dtype)) for x in (call.q, call.k, call.v))
    rows, sums = operators().native_tree_step(
        q,
        k,
        v,
        *(None if x is None else x.to(dtype) for x in given),
        in_rows(call.inputs[LEVELS.name].to(dtype)),
        tree.sums.contiguous(),
        tree.slots,
        tree.tokens,
        rule.delta,
        rule.l2_norm,
        scale,
    )
    seen = None if tree.tokens is None else tree.tokens + 1
    return rows, Tree(sums, None, tree.slots + 1, seen)


def why_not(call: Call) -> str | None:
    """Why the compiled operator refuses the call; None when it takes it."""
    if call.key_length != 1 or call.query_length != 1:
        return f"it is for one token, got {call.query_length} queries and {call.key_length} keys"
    if call.key_mask is not None:
        return "it has no padding"
    if torch.is_grad_enabled():
        return "it has no gradient: call step under torch.no_grad()"
    return compiled_recurrence.why_not(call)
