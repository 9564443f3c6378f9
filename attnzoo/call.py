"""One request for attention: its tensors, the checks that guard them, and the two rules that keep
bad slots from spreading."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnzoo.eager import can_look


class UnsupportedError(ValueError):
    """A variant or backend was asked for something that its `Spec` or its `why_not` excludes."""


@dataclass(frozen=True)
class Call:
    """What an engine is asked to do: `A(q, k) · v` under the given masks.

    q: (batch, heads, query_length, head_dim); k: (batch, kv_heads, key_length, head_dim); v:
    (batch, kv_heads, key_length, value_dim).
    key_mask: (batch, key_length) bool, True = attend. attn_mask: bool (True = attend) or additive
    float, broadcastable to (batch, heads, query_length, key_length). Query i stands at position
    key_length - query_length + i.
    global_mask: (batch, key_length) bool, True = a token that everyone sees and that sees everyone.
    global_qkv: other q, k and v of the same shapes, from which the rows of global tokens are made.
    global_counts: the most global keys, and the most global queries, of a sample, where the engine
    knows them. sink_logits: (heads,) floating, one more score of every row, that counts in its sum
    and weighs nothing.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    is_causal: bool = False
    global_mask: Tensor | None = None
    global_qkv: tuple[Tensor, Tensor, Tensor] | None = None
    global_counts: tuple[int, int] | None = None
    sink_logits: Tensor | None = None

    @property
    def query_length(self) -> int:
        return self.q.shape[2]

    @property
    def key_length(self) -> int:
        return self.k.shape[2]

    @property
    def offset(self) -> int:
        """Position of the first query (rule 2, bottom-right): negative when there are more queries
        than keys."""
        return self.key_length - self.query_length

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.q.shape[1] // self.k.shape[1]


def repeat_heads(x: Tensor, group: int) -> Tensor:
    """(batch, kv_heads, ...) -> (batch, kv_heads * group, ...): every query head gets its own copy
    of the shared head."""
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def check(call: Call, heads: int, head_dim: int) -> None:
    """Raise a ValueError that names the argument, its value and what is allowed."""
    q, k, v = call.q, call.k, call.v
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x, "(batch, heads, length, head_dim)")
        if x.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must have 4 dimensions: (batch, heads, "
                "length, head_dim)"
            )
        if not x.is_floating_point():
            raise ValueError(
                f"{name} has dtype {x.dtype}; attention needs a floating dtype: convert it with "
                f"{name}.float()"
            )
        if x.dtype != q.dtype:
            raise ValueError(
                f"{name} has dtype {x.dtype} and q has {q.dtype}; they must agree: convert one of "
                "them"
            )
        if x.device != q.device:
            raise ValueError(
                f"{name} is on {x.device} and q is on {q.device}; they must be on one device"
            )
        if x.shape[0] != q.shape[0]:
            raise ValueError(
                f"{name} has batch size {x.shape[0]} and q has {q.shape[0]}; they must agree"
            )
    if q.shape[1] != heads:
        raise ValueError(
            f"q has {q.shape[1]} heads (shape {tuple(q.shape)}); this attention was built with "
            f"heads={heads}"
        )
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads and v has {v.shape[1]}; they must agree")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(
            f"k and v have {k.shape[1]} heads; that must divide heads={heads} (grouped-query "
            "attention)"
        )
    if q.shape[3] != head_dim or k.shape[3] != head_dim:
        raise ValueError(
            f"q and k have head_dim {q.shape[3]} and {k.shape[3]}; this attention was built with "
            f"head_dim={head_dim}"
        )
    if k.shape[2] != v.shape[2]:
        raise ValueError(
            f"k has length {k.shape[2]} and v has length {v.shape[2]}; they must agree"
        )
    if not isinstance(call.is_causal, bool | torch.SymBool):
        raise ValueError(
            f"is_causal={call.is_causal!r} is a {type(call.is_causal).__name__}; give True or False"
        )
    _check_token_mask("key_mask", call.key_mask, call, "attend")
    _check_token_mask("global_mask", call.global_mask, call, "global")
    _check_attn_mask(call)
    _check_global_qkv(call)
    _check_sink_logits(call)


def _check_token_mask(name: str, mask: Tensor | None, call: Call, true: str) -> None:
    if mask is None:
        return
    wanted = (call.k.shape[0], call.key_length)
    _check_tensor(name, mask, "(batch, key_length)")
    if mask.dtype != torch.bool:
        raise ValueError(
            f"{name} has dtype {mask.dtype}; it must be bool with True = {true}: use {name}.bool()"
        )
    if tuple(mask.shape) != wanted:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}; it must be (batch, key_length) = {wanted}"
        )
    if mask.device != call.q.device:
        raise ValueError(
            f"{name} is on {mask.device} and q is on {call.q.device}; they must be on one device"
        )


def _check_global_qkv(call: Call) -> None:
    if call.global_qkv is None:
        return
    if not isinstance(call.global_qkv, tuple) or len(call.global_qkv) != 3:
        raise ValueError(
            "global_qkv must be a tuple of three tensors: q, k and v of the global tokens' rows, "
            "shaped as q, k and v"
        )
    for name, x, like in zip("qkv", call.global_qkv, (call.q, call.k, call.v), strict=True):
        _check_tensor(f"global_qkv's {name}", x, f"as {name}")
        if x.shape != like.shape or x.dtype != like.dtype or x.device != like.device:
            found, wanted = ((tuple(y.shape), y.dtype, str(y.device)) for y in (x, like))
            raise ValueError(
                f"global_qkv's {name} is {found}; in shape, dtype and device it must be as {name}: "
                f"{wanted}"
            )


def _check_sink_logits(call: Call) -> None:
    logits, heads = call.sink_logits, call.q.shape[1]
    if logits is None:
        return
    _check_tensor("sink_logits", logits, "(heads,)")
    if tuple(logits.shape) != (heads,) or not logits.is_floating_point():
        raise ValueError(
            f"sink_logits is {tuple(logits.shape)} {logits.dtype}; it must be floating, one logit "
            f"a head: ({heads},)"
        )
    if logits.device != call.q.device:
        raise ValueError(
            f"sink_logits is on {logits.device} and q is on {call.q.device}; they must be on one "
            "device"
        )


def _check_attn_mask(call: Call) -> None:
    mask = call.attn_mask
    if mask is None:
        return
    _check_tensor(
        "attn_mask", mask, "(batch, heads, query_length, key_length), or one that broadcasts to it"
    )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"attn_mask has dtype {mask.dtype}; it must be bool (True = attend) or floating (added "
            "to the scores)"
        )
    wanted = (*call.q.shape[:3], call.key_length)
    if mask.dim() > 4 or any(
        m not in (1, w) for m, w in zip(mask.shape[::-1], wanted[::-1], strict=False)
    ):
        raise ValueError(
            f"attn_mask has shape {tuple(mask.shape)}; it must broadcast to (batch, heads, "
            f"query_length, key_length) = {wanted}"
        )
    if mask.device != call.q.device:
        raise ValueError(
            f"attn_mask is on {mask.device} and q is on {call.q.device}; they must be on one device"
        )


def _check_tensor(name: str, value: object, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} is a {type(value).__name__}; give a torch tensor of shape {shape}"
        )


def clear_padding(call: Call) -> Call:
    """Zero the padded slots of k and v, so that nothing in them (NaN included) can reach a real
    row, forward or backward (rules 3, 4)."""
    return call if call.key_mask is None else _zeroed(call, ~call.key_mask[:, None, :, None])


def _zeroed(call: Call, slots: Tensor) -> Call:
    """The call with k and v (those of global rows too) zeroed at `slots`, which broadcast to
    them."""
    k, v, own = call.k.masked_fill(slots, 0.0), call.v.masked_fill(slots, 0.0), call.global_qkv
    if own is not None:
        own = (own[0], own[1].masked_fill(slots, 0.0), own[2].masked_fill(slots, 0.0))
    return replace(call, k=k, v=v, global_qkv=own)


def shield_past(call: Call, *, may_stall: bool = False) -> tuple[Call, Tensor | None]:
    """Keep a NaN or inf at slot j from the rows before j (rule 5): 0 · NaN is NaN in every matmul,
    whatever the mask says.

    Returns the call with the bad slots zeroed, and the rows to overwrite with NaN, (batch,
    query_length) bool: all that stand at or after a bad slot. None when there is nothing to do.
    Looking costs one read of k and v; where a look would stall (CUDA, unless it may_stall) or
    cannot be (see `can_look`) the slots are zeroed unconditionally.
    """
    k = call.k
    if not call.is_causal or k.is_meta:
        return call, None
    pairs = (
        [(call.k, call.v)] if call.global_qkv is None else [(call.k, call.v), call.global_qkv[1:]]
    )
    if can_look(k, call.v, may_stall=may_stall) and all(
        _all_finite(keys.detach(), values.detach()) for keys, values in pairs
    ):
        return call, None
    wide = _summed_in(k)
    sums = [keys.sum(-1, dtype=wide) + values.sum(-1, dtype=wide) for keys, values in pairs]
    bad = ~torch.isfinite(
        sums[0] if len(sums) == 1 else sums[0] + sums[1]
    )  # (batch, kv_heads, key_length)
    reached = bad.any(1).cumsum(-1) > 0
    rows = reached.new_zeros(k.shape[0], call.query_length)
    common = min(call.query_length, call.key_length)
    rows[:, call.query_length - common :] = reached[:, call.key_length - common :]
    return _zeroed(call, bad[..., None]), rows


def _all_finite(k: Tensor, v: Tensor) -> bool:
    """False when there is a NaN or inf in k or v, and perhaps when their squares overflow."""
    if k.shape == v.shape and k.is_contiguous() and v.is_contiguous() and k.dtype == _summed_in(k):
        return math.isfinite(
            torch.dot(k.view(-1), v.view(-1)).item()
        )  # whatever multiplies a NaN or inf, the sum is no number
    return math.isfinite((k.sum(dtype=_summed_in(k)) + v.sum(dtype=_summed_in(k))).item())


def _summed_in(k: Tensor) -> torch.dtype:
    return torch.float64 if k.dtype == torch.float64 else torch.float32
