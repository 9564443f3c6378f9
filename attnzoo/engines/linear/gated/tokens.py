"""What the rules of a gated state are told of every token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import can_look
from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.linear.layout import may_overwrite
from attnzoo.sequences.padding import squared
from attnzoo.spec import Input

NORM_EPSILON = 1e-6  # inside the root, as the published models have it
LONGEST_REMOVAL = 1.01  # a length of 1, rounded in half precision


#: A number for every token and head: what is left of the state, e^log_decay.
HEAD_GATE = Input("log_decay", "batch kv_heads keys", padded=0.0, activation=F.logsigmoid)
#: The same for every row of the state.
CHANNEL_GATE = Input("log_decay", "batch kv_heads keys width", padded=0.0, activation=F.logsigmoid)
#: How much of what the state says of a key is replaced.
STRENGTH = Input("beta", "batch kv_heads keys", padded=0.0, activation=torch.sigmoid)
#: What is removed from the state, of length 1, where that is not the key.
REMOVAL_KEY = Input(
    "removal_key",
    "batch kv_heads keys width",
    padded=0.0,
    activation=partial(F.normalize, dim=-1),
)
#: How much of what the state says of it is removed from each row of the state.
REMOVAL_RATE = Input(
    "removal_rate", "batch kv_heads keys width", padded=0.0, activation=torch.sigmoid
)


@dataclass(frozen=True)
class Rule:
    """What a token does to the state S, (width, value_dim): this fades by log_decay, to D S, and

        S ← D S + k vᵀ                            where it adds
        S ← D S + β k (v - (D S)ᵀk)ᵀ              where the delta rule holds
        S ← D S + k vᵀ - (r ∘ c) (Sᵀ c)ᵀ          where it removes what stands at c, at the rates r

    The token's row is scale · Sᵀq.

    gate: the input by which the state fades, `HEAD_GATE` or `CHANNEL_GATE`; None: it does not
    scale: factor of the rows; None: 1/sqrt(width)
    delta: whether the delta rule holds
    removes: whether a token removes at `REMOVAL_KEY` what it does not write to
    l2_norm: whether q and k are divided by their length first
    """

    gate: Input | None = None
    scale: float | None = None
    delta: bool = False
    removes: bool = False
    l2_norm: bool = False

    @property
    def by_channel(self) -> bool:
        """Whether each row of the state has a gate of its own."""
        return self.gate is not None and "width" in self.gate.names


def prepared(rule: Rule, call: Call) -> Call:
    """The call with q, k, v and the gates as the recurrence reads them, in the precision of sums.

    call: without segments, which `separated` makes gates of; tensors may be cut into chunks
    """
    dtype = accumulation_dtype(call.q.dtype)
    q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
    scale = int(q.shape[-1]) ** -0.5 if rule.scale is None else rule.scale
    if rule.l2_norm:
        q, k = q * (inverse_length(q) * scale), k * inverse_length(k)
    elif scale != 1:
        q = q * scale
    inputs = {name: x.to(dtype) for name, x in call.inputs.items()}
    made = told_what_to_remove(rule, replace(call, q=q, k=k, v=v, inputs=inputs))
    if rule.gate is None or "log_decay" in inputs:
        return made
    return made.giving(rule.gate, torch.zeros_like(k if rule.by_channel else k[..., 0]))


def told_what_to_remove(rule: Rule, call: Call) -> Call:
    """The call with the inputs of a removal that it lacks: at the key's direction, all of it."""
    if rule.removes and call.get(REMOVAL_KEY.name) is None:
        call = call.giving(REMOVAL_KEY, call.k * inverse_length(call.k))
    if rule.removes and call.get(REMOVAL_RATE.name) is None:
        call = call.giving(REMOVAL_RATE, torch.ones_like(call.k))
    return call


def separated(rule: Rule, call: Call) -> Call:
    """The call without segments: its gates close at the first token of every piece but the first,
    which no token of an earlier piece reaches behind. What is removed is read before the gate, so
    that token removes nothing."""
    ids, gate, log_decay = call.segments, rule.gate or HEAD_GATE, call.get("log_decay")
    if ids is None:
        return call
    begins = torch.zeros_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    if log_decay is None:
        log_decay = torch.zeros_like(call.k if rule.by_channel else call.k[..., 0])
    if rule.removes:
        call = told_what_to_remove(rule, call)
        removed = call.inputs[REMOVAL_KEY.name].masked_fill(begins[:, None, :, None], 0.0)
        call = call.giving(REMOVAL_KEY, removed)
    begins = begins[:, None, :, None] if log_decay.dim() == 4 else begins[:, None]
    return replace(call.giving(gate, log_decay.masked_fill(begins, float("-inf"))), segments=None)


def as_square(of: Callable[[Call], Tensor], call: Call) -> Tensor:
    """What `of` says of the call's rows, which it can say of calls with as many queries as keys.

    Queries before the first key see nothing: their rows are 0. Where there are fewer queries, rows
    of zeros stand before them.
    """
    if call.offset < 0:
        seeing = of(call.select(queries=slice(-call.offset, None)))
        return F.pad(seeing, (0, 0, -call.offset, 0))
    return of(squared(call))[:, :, call.offset :] if call.offset else of(call)


def empty_state(call: Call) -> Tensor:
    """The state before the first token, (batch, kv_heads, width, value_dim)."""
    k, dtype = call.k, accumulation_dtype(call.k.dtype)
    return k.new_zeros(*k.shape[:2], k.shape[3], call.v.shape[3], dtype=dtype)


def constant_gates(slopes: tuple[float, ...], call: Call) -> Call:
    """The call with gates that let the state fade by e^-slope for every real token.

    slopes: of every query head; a key head has that of the first query head that reads it
    """
    k = call.k
    fades = -torch.tensor(slopes[:: call.group], dtype=accumulation_dtype(k.dtype), device=k.device)
    gates = fades[:, None].expand(*k.shape[:3])
    if call.key_mask is not None:
        gates = gates.masked_fill(~call.key_mask[:, None], 0.0)
    return call.giving(HEAD_GATE, gates)


def check_gates(call: Call) -> None:
    """Raise a ValueError where a gate lies outside of its range. Gates are read where this costs no
    waiting for a device."""
    log_decay = call.get("log_decay")
    if log_decay is not None and can_look(log_decay) and not _lies(log_decay, -torch.inf, 0):
        above = log_decay[log_decay > 0].max().item()
        raise ValueError(
            f"log_decay has the value {above:.6g}, above 0: it is the natural "
            "logarithm of what is left of the state, so take -F.softplus(x) or F.logsigmoid(x)"
        )
    for name in ("beta", "removal_rate"):
        x = call.get(name)
        if x is not None and can_look(x) and not _lies(x, 0, 2):
            raise ValueError(
                f"{name} has the value {x[(x < 0) | (x > 2)][0].item():.6g}, outside of 0 to 2, "
                "where a write would make the state grow without bound: take x.sigmoid(), or "
                "2 * x.sigmoid()"
            )
    removed = call.get("removal_key")
    if removed is not None and can_look(removed):
        length = removed.detach().to(accumulation_dtype(removed.dtype)).norm(dim=-1)
        if (length > LONGEST_REMOVAL).any():
            raise ValueError(
                f"removal_key has a vector of length {length.max().item():.6g}, above 1, by which "
                "a removal would make the state grow without bound: take F.normalize(x, dim=-1)"
            )


def _lies(x: Tensor, low: float, high: float) -> bool:
    """Whether no number of x is below `low` or above `high`; NaN is not. Extrema take a fraction of
    the time of comparing all, and are NaN where one is."""
    if not x.numel():
        return True
    least, most = x.detach().aminmax()
    if low <= least.item() and most.item() <= high:
        return True
    return not ((x < low) | (x > high)).any()


def inverse_length(x: Tensor) -> Tensor:
    """What brings the last dimension of x to length 1, (..., 1)."""
    if may_overwrite(x):  # nobody follows, and the derivative of a norm is no number at 0
        squared = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
    else:
        squared = x.square().sum(-1, keepdim=True)
    return (squared + NORM_EPSILON).rsqrt()
