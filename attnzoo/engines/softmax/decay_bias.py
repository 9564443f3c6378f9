"""Scores that fade by gates: a key loses what all tokens behind it forget.

    s_ij = scale · q_i·k_j + log_decay_{j+1} + … + log_decay_i

The sums are differences of sums since the first token, in float64, so that a difference of a
million tokens is exact to float32. A gate that closes, at -inf or so low that it might be, hides
every key before its token from that token on, and counts 0 in the sums.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import can_look
from attnzoo.engines.engine import accumulation_dtype
from attnzoo.spec import Input

#: A number for every query head and token: what is left of the scores of earlier keys, as log.
LOG_DECAY = Input("log_decay", "batch heads keys", padded=0.0, activation=F.logsigmoid)
#: A gate from here down is closed: beside it float64 would lose what later gates add up to.
CLOSED = -1e5


def summed(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of the gates up to every token, its own included, in float64, and how many gates
    have closed until then, both (batch, heads, keys).

    log_decay: (batch, heads, keys)
    """
    closed = log_decay <= CLOSED
    return log_decay.double().masked_fill(closed, 0.0).cumsum(-1), closed.cumsum(-1)


def decay_bias_of(call: Call) -> Tensor | None:
    """What gates add to the scores of a causal call, (batch, heads, query_length, key_length) in
    the precision of sums; None where it has none. It means nothing for later keys, which causality
    hides."""
    log_decay = call.get(LOG_DECAY.name)
    if log_decay is None:
        return None
    dtype, ahead, behind = (
        accumulation_dtype(call.q.dtype),
        max(0, -call.offset),
        max(0, call.offset),
    )

    def of_queries(x: Tensor) -> Tensor:
        return (F.pad(x, (ahead, 0)) if ahead else x)[..., behind:, None]

    if all_open(log_decay):
        sums = log_decay.double().cumsum(-1)
        return (of_queries(sums) - sums[..., None, :]).to(dtype)
    sums, closings = summed(log_decay)
    bias = (of_queries(sums) - sums[..., None, :]).to(dtype)
    return bias.masked_fill(of_queries(closings) > closings[..., None, :], -torch.inf)


def all_open(log_decay: Tensor) -> bool:
    """Whether no gate is closed, as far as it may be read."""
    return (
        log_decay.numel() > 0 and can_look(log_decay) and log_decay.detach().amin().item() > CLOSED
    )
