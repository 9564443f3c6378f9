"""Gates and delta rules as they are defined: one token after another."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.linear.gated.tokens import Rule


def advance(rule: Rule, call: Call, state: Tensor) -> Tensor:
    """The state after one token.

    call: of that token alone, as `tokens.prepared` makes it
    state: (batch, kv_heads, width, value_dim)
    """
    k, v = call.k[:, :, 0, :, None], call.v[:, :, 0, None]  # columns and rows
    log_decay, before = call.get("log_decay"), state
    if log_decay is not None:
        kept = log_decay[:, :, 0].exp()
        state = state * (kept[..., None] if log_decay.dim() == 4 else kept[..., None, None])
    if rule.removes:
        removed = call.inputs["removal_key"][:, :, 0, :, None]
        turned = removed * call.inputs["removal_rate"][:, :, 0, :, None]
        state = state - turned * (removed.mT @ before)
    if not rule.delta:
        return torch.addcmul(state, k, v)
    new, beta = v - k.mT @ state, call.get("beta")
    if beta is not None:
        new = new * beta[..., None]
    return torch.addcmul(state, k, new)


def recur(rule: Rule, call: Call, state: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A row, (batch, heads, 1, value_dim), and the state after each token of a call that
    `tokens.prepared` made."""
    for token in range(call.key_length):
        here = slice(token, token + 1)
        one = call if call.key_length == 1 else call.select(queries=here, keys=here)
        state = advance(rule, one, state)
        rows = one.q.flatten(1, 2).unflatten(1, (state.shape[1], -1)) @ state
        yield rows.flatten(1, 2)[:, :, None], state
