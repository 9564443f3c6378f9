"""Bad slots: what stands in padding reaches nothing, and a NaN reaches no row before it in a causal
call and no other piece (rules 3 to 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import KEYS, Call
from attnzoo.eager import can_look, only_autograd_looks
from attnzoo.sequences.ordering import running_maximum
from attnzoo.spec import Input


def clear_padding(call: Call) -> Call:
    """Clear the padded slots of k, v and the inputs, so that nothing in them (NaN included) can
    reach a real row, forward or backward (rules 3, 4)."""
    if call.key_mask is None:
        return call
    k, v = _cleared(call)
    return replace(_with_clear_inputs(call), k=k, v=v)


def _with_clear_inputs(call: Call) -> Call:
    """The call with what its declaration says in padded slots of its inputs."""
    if call.key_mask is None or not call.inputs:
        return call
    slots = ~call.key_mask
    inputs = dict(call.inputs)
    for one, x in call.given():
        if "keys" in one.names and one.padded is not None:
            shown = [size if axis in ("batch", "keys") else 1 for axis, size in _sizes(one, x)]
            # A bool as a number: a trace knows no masked_fill by a bool.
            value = int(one.padded) if isinstance(one.padded, bool) else one.padded
            inputs[one.name] = x.masked_fill(slots.reshape(shown), value)
    return replace(call, inputs=inputs)


def _cleared(call: Call) -> tuple[Tensor, Tensor]:
    """k and v of a call with zeros in padded slots."""
    assert call.key_mask is not None
    k, v, keep = call.k, call.v, call.key_mask[:, None, :, None]
    if k.device.type != "cpu" or not only_autograd_looks(k, v) or not can_look(k, v):
        return k.masked_fill(~keep, 0.0), v.masked_fill(~keep, 0.0)
    finite, numbers = _all_finite(k.detach(), v.detach()), keep.to(k.dtype)
    return _zeroed(k, keep, numbers, finite), _zeroed(v, keep, numbers, finite)


def _zeroed(x: Tensor, keep: Tensor, numbers: Tensor, finite: bool) -> Tensor:
    """x with zeros where `keep` is False, forward and backward.

    keep: bool, broadcastable to x; numbers: the same as 0 and 1
    finite: whether x holds neither NaN nor inf. A product then does, in a fifth of the time that
        masked_fill takes on a CPU
    """
    if x.requires_grad:
        return _Zeroed.apply(x, keep, numbers, finite)  # pyright: ignore[reportReturnType]
    product = x * numbers
    return product if finite else product.masked_fill_(~keep, 0.0)  # of the same strides


class _Zeroed(torch.autograd.Function):
    """As `_zeroed`, of a tensor that asks for a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, numbers: Tensor, finite: bool) -> Tensor:
        ctx.save_for_backward(keep, numbers)
        return _zeroed(x.detach(), keep, numbers, finite)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        finite = can_look(grad) and _all_finite(grad.detach(), grad.detach())
        keep, numbers = ctx.saved_tensors
        return _zeroed(grad, keep, numbers, finite), None, None, None


def _sizes(one: Input, x: Tensor) -> Iterator[tuple[str, int]]:
    return zip(one.names, x.shape, strict=True)


def shield(
    call: Call, check: Callable[[Call], None], *, reads_padding: bool
) -> tuple[Call, Tensor | None]:
    """`shield_past` of the call, whose padded slots are cleared.

    check: refuses what is no input, before an inf is taken out of it
    reads_padding: whether somebody reads those of k and v; where nobody does, they stay as they are
    """
    harmless = call.key_mask is not None and not reads_padding
    if harmless and (call.is_causal or call.segments is not None):
        # What is no number may also stand in real slots: then they are cleared to find out.
        harmless = can_look(call.k, call.v) and _all_finite(call.k.detach(), call.v.detach())
    call = _with_clear_inputs(call) if harmless else clear_padding(call)
    check(call)
    return shield_past(call)


def shield_past(call: Call, *, may_stall: bool = False) -> tuple[Call, Tensor | None]:
    """Keep a NaN or inf at slot j from the rows that do not see it, such as the earlier ones of a
    causal call: 0 · NaN is NaN in every matrix product, whatever the mask says.

    may_stall: whether values may be read even where that waits for a GPU. Reading them costs one
        pass over k, v and the inputs along the keys, and may show that there is nothing to do
    returns: the call with a number in place of every NaN and inf, and the rows to overwrite with
        NaN, (batch, query_length) bool: those that see a bad slot. None where there is nothing to
        do, as where every row sees every slot.
    """
    k, v = call.k, call.v
    if not (call.is_causal or call.segments is not None) or k.is_meta:
        return call, None
    read = [
        (one, x)
        for one, x in call.given()
        if "keys" in one.names and one.padded is not None and x.is_floating_point()
    ]
    if (
        can_look(k, v, may_stall=may_stall)
        and _all_finite(k.detach(), v.detach())
        and all(math.isfinite(x.detach().sum(dtype=_summed_in(x)).item()) for _, x in read)
    ):
        return call, None
    largest = _largest(k, KEYS)
    if v.shape[3] and v is not k:
        largest = torch.maximum(largest, _largest(v, KEYS))
    for one, x in read:
        largest = torch.maximum(largest, _largest(x, one.names, closes=one.like is None))
    reached = _reached(~(largest < math.inf), call)
    rows = reached[:, call.offset :] if call.offset >= 0 else F.pad(reached, (-call.offset, 0))
    inputs = {
        one.name: _only_numbers(x, float(one.padded or 0), closes=one.like is None)
        for one, x in read
    }
    inputs = {**call.inputs, **inputs}
    return replace(call, k=_only_numbers(k), v=_only_numbers(v), inputs=inputs), rows


def poison(out: Tensor, rows: Tensor) -> Tensor:
    """`out`, (batch, heads, query_length, ...), with NaN in these rows, (batch, query_length)."""
    return torch.where(rows[:, None, :, None], math.nan, out)  # one pass, where masked_fill has two


def _largest(x: Tensor, axes: tuple[str, ...], *, closes: bool = False) -> Tensor:
    """The largest size of a number in every slot, (batch, key_length): NaN where one is NaN. A sum
    would tell too, but could overflow.

    closes: whether -inf is a number like others: the logarithm of a gate that closes
    """
    others = [dim for dim, axis in enumerate(axes) if axis not in ("batch", "keys")]
    x = x.detach()
    if closes:
        return x.amax(others) if others else x
    return torch.linalg.vector_norm(x, math.inf, others) if others else x.abs()


def _only_numbers(x: Tensor, value: float = 0.0, *, closes: bool = False) -> Tensor:
    """x with `value` in place of every NaN and inf: one pass over memory, and none backward.
    closes: as in `_largest`."""
    lowest = -math.inf if closes else value
    if x.requires_grad and only_autograd_looks(x):
        return _OnlyNumbers.apply(x, value, lowest)  # pyright: ignore[reportReturnType]
    return x.nan_to_num(value, value, lowest)


class _OnlyNumbers(torch.autograd.Function):
    """As `_only_numbers`. The gradient passes as it is: no row that sees a bad slot sends one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float, lowest: float) -> Tensor:
        return x.nan_to_num(value, value, lowest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def _reached(bad: Tensor, call: Call) -> Tensor:
    """Which positions see a bad slot, (batch, key_length). Tokens of a piece stand together."""
    if call.segments is None:
        return bad.cumsum(-1) > 0
    reached = _behind_bad(bad, call.segments)
    if call.is_causal:
        return reached
    return reached | _behind_bad(bad.flip(1), call.segments.flip(1)).flip(1)


def _behind_bad(bad: Tensor, segments: Tensor) -> Tensor:
    """Positions at or after a bad slot of their own piece, (batch, key_length)."""
    count = bad.cumsum(-1)
    begins = torch.ones_like(bad)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    before = running_maximum((count - bad.long()).masked_fill(~begins, 0))
    return count > before


def _all_finite(k: Tensor, v: Tensor) -> bool:
    """False when there is a NaN or inf in k or v, and perhaps when their squares overflow."""
    if k.shape == v.shape and k.is_contiguous() and v.is_contiguous() and k.dtype == _summed_in(k):
        return math.isfinite(
            torch.dot(k.view(-1), v.view(-1)).item()
        )  # whatever multiplies a NaN or inf, the sum is no number
    return math.isfinite((k.sum(dtype=_summed_in(k)) + v.sum(dtype=_summed_in(k))).item())


def _summed_in(k: Tensor) -> torch.dtype:
    return torch.float64 if k.dtype == torch.float64 else torch.float32
