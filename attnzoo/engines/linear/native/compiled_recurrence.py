"""The compiled operators: a pass over tokens that write to a state and read it, and the way back.

Inside, 16 tokens at a time see each other through small matrices of scores, and read what lies
before them from the state; both stay in the cache. Only sums of gates are exponentiated, none of
which is above 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import is_recorded, only_autograd_looks
from attnzoo.engines.linear.sums import UNDERFLOW
from attnzoo.engines.native import library
from attnzoo.engines.native.library import cannot_compile, operators

#: Tokens from one state that is kept for the way back to the next: whole chunks.
SPAN = 128


class Tokens(NamedTuple):
    """What a pass is told of every token, all of one dtype, float32 or float64.

    q: (batch, heads, length, width)
    k, v: (batch, kv_heads, length, width or value_dim)
    log_decay: (batch, kv_heads, length), also with the width; None: nothing fades
    beta: (batch, kv_heads, length), of the delta rule; None: 1
    removed, turned: as k, what is removed, and the same by its rates; None: nothing
    key_mask: (batch, length) bool, where a token has a key and a value; None: everywhere
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    beta: Tensor | None = None
    removed: Tensor | None = None
    turned: Tensor | None = None
    key_mask: Tensor | None = None


class Found(NamedTuple):
    """What a pass gives.

    rows: (batch, heads, length, value_dim)
    divisors: (batch, heads, length), what each row was divided by; empty where by nothing
    states: (batch, kv_heads, spans, width, columns), before every `SPAN` tokens; empty where they
        were not to be remembered. columns: value_dim, and one for the sums of rows
    after: (batch, kv_heads, width, columns), the state behind the last token
    """

    rows: Tensor
    divisors: Tensor
    states: Tensor
    after: Tensor


@dataclass(frozen=True)
class Recurrence:
    """What tokens do to the state, and how rows are read from it.

    scale: factor of the queries
    delta: whether a token writes its value less what the state says of its key
    l2_norm: whether queries and keys are divided by their length first
    normalizes: whether each row is divided by the sum of its row of A
    elu: whether features elu(x) + 1 of queries and keys take their place
    """

    scale: float = 1.0
    delta: bool = False
    l2_norm: bool = False
    normalizes: bool = False
    elu: bool = False

    def forward(self, tokens: Tokens, before: Tensor | None, *, remember: bool) -> Found:
        """before: the state before the first token, as `Found.after`; None: 0. remember: whether
        the states that `backward` needs are wanted."""
        ready, underflow = _in_rows(tokens), UNDERFLOW[tokens.q.dtype]
        settings = (*self._flags(), self.scale, underflow, SPAN if remember else 0)
        before = None if before is None else before.contiguous()
        return Found(*operators().native_recurrence(*ready, before, *settings))

    def backward(
        self, tokens: Tokens, found: Found, sent: Tensor, d_after: Tensor | None
    ) -> tuple[Tokens, Tensor]:
        """Gradients of the tokens, and of the state before them.

        found: of `forward`, whose `after` is not read
        sent: gradient of its rows
        d_after: gradient of the state behind them; None when nothing reads it
        """
        ready = _in_rows(tokens)
        d_after = None if d_after is None else d_after.contiguous()
        kept = (found.rows.contiguous(), found.divisors.contiguous(), found.states)
        *gradients, d_before = operators().native_recurrence_backward(
            sent.contiguous(),
            *kept,
            d_after,
            *ready,
            *self._flags(),
            self.scale,
            SPAN,
        )
        d_q, d_k, d_v, *others = gradients
        given = iter(others)
        rest = (None if x is None else next(given) for x in tokens[3:7])
        return Tokens(d_q, d_k, d_v, *rest), d_before

    def _flags(self) -> tuple[bool, ...]:
        return self.delta, self.l2_norm, self.normalizes, self.elu


def _in_rows(tokens: Tokens) -> Tokens:
    """Tokens whose vectors lie each in one piece."""

    def in_rows(x: Tensor) -> Tensor:
        if x.dtype == torch.bool:
            return x.contiguous()
        return x if x.dim() < 4 or x.stride(-1) == 1 else x.contiguous()

    if all(x is None or x.is_contiguous() for x in tokens):
        return tokens
    given = (None if x is None else in_rows(x) for x in tokens[3:])
    return Tokens(in_rows(tokens.q), in_rows(tokens.k), in_rows(tokens.v), *given)


def why_not(call: Call) -> str | None:
    """Why the compiled operators may not compute a call; None when they may."""
    if call.q.device.type != "cpu":
        return f"it is for a CPU, got {call.q.device}"
    if call.q.is_meta or is_recorded() or not only_autograd_looks(*_tensors(call)):
        return "a graph or transform must see the operators inside"
    return cannot_compile()


def _tensors(call: Call) -> tuple[Tensor, ...]:
    return (call.q, call.k, call.v, *call.inputs.values())


def passed_over(call: Call) -> str | None:
    """Why backend="auto" passes over them; None where it does not."""
    reason = library.not_compiled()
    if reason is None and torch.get_num_threads() > 2 * call.k.shape[0] * call.k.shape[1]:
        return (
            f"it has a thread for each head of keys, {call.k.shape[0] * call.k.shape[1]}, and "
            f"{torch.get_num_threads()} threads are there"
        )
    return reason
