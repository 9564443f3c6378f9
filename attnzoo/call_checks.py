"""What a call must be: the one check of q, k, v, the masks and the inputs that a variant
declares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from attnzoo.arguments import nearest
from attnzoo.call import Call, UnsupportedError
from attnzoo.spec import FREE, Input, Spec, registered, with_spec

#: Dtypes of q, k and v.
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(call: Call, spec: Spec, heads: int, head_dim: int, key_width: int | None = None) -> None:
    """Raise a ValueError that names the argument, its value and what is allowed.

    call: not yet checked; what it brings that spec does not declare is among its inputs
    spec: of the variant, for its inputs and its name
    heads: of q
    head_dim: of q, and of k
    key_width: of k, where it is another
    raises: ValueError on a malformed tensor and on an input that nobody takes, UnsupportedError on
        one that only other variants take
    """
    q, k, v = call.q, call.k, call.v
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x, "(batch, heads, length, head_dim)")
        if x.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must have 4 dimensions: (batch, heads, "
                "length, head_dim)"
            )
        if x.dtype not in FLOATING:
            _refuse_dtype(name, x)
        if x.layout != torch.strided:
            raise ValueError(f"{name} is {x.layout}; give a dense tensor: {name}.to_dense()")
        if x.dtype != q.dtype:
            raise ValueError(
                f"{name} has dtype {x.dtype} and q has {q.dtype}; they must agree: convert one of "
                "them"
            )
        if x.device != q.device:
            raise ValueError(
                f"{name} is on {x.device} and q is on {q.device}; they must be on one device"
            )
    _check_sizes(q.shape, k.shape, v.shape, heads, (head_dim, key_width or head_dim))
    if not isinstance(call.is_causal, bool | torch.SymBool):
        raise ValueError(
            f"is_causal={call.is_causal!r} is a {type(call.is_causal).__name__}; give True or False"
        )
    _check_key_mask(call)
    _check_attn_mask(call)
    check_segments(call)
    if call.inputs or spec.inputs:
        _check_inputs(call, spec)


def _refuse_dtype(name: str, x: Tensor) -> NoReturn:
    if x.is_floating_point():
        raise ValueError(
            f"{name} has dtype {x.dtype}, in which attention has no sums; convert it to one of "
            f"{', '.join(map(str, FLOATING))}"
        )
    raise ValueError(
        f"{name} has dtype {x.dtype}; attention needs a real floating dtype: convert it "
        f"with {name}.{'real' if x.is_complex() else 'float()'}"
    )


def _check_sizes(
    q: torch.Size, k: torch.Size, v: torch.Size, heads: int, widths: tuple[int, int]
) -> None:
    """q, k, v: their shapes. heads: of q. widths: of q and k."""
    for name, shape in (("k", k), ("v", v)):
        if shape[0] != q[0]:
            raise ValueError(f"{name} has batch size {shape[0]} and q has {q[0]}; they must agree")
    if q[1] != heads:
        raise ValueError(
            f"q has {q[1]} heads (shape {tuple(q)}); this attention was built with heads={heads}"
        )
    if k[1] != v[1]:
        raise ValueError(f"k has {k[1]} heads and v has {v[1]}; they must agree")
    if k[1] == 0 or heads % k[1]:
        raise ValueError(
            f"k and v have {k[1]} heads; that must divide heads={heads} (grouped-query attention)"
        )
    if (q[3], k[3]) != widths:
        more = f" and keys of {widths[1]}" if widths[0] != widths[1] else ""
        raise ValueError(
            f"q and k have head_dim {q[3]} and {k[3]}; this attention was built with "
            f"head_dim={widths[0]}{more}"
        )
    if k[2] != v[2]:
        raise ValueError(f"k has length {k[2]} and v has length {v[2]}; they must agree")


def check_new_tokens(call: Call) -> None:
    """Raise a ValueError where a step's tokens do not bring a query and a key each."""
    if call.query_length != call.key_length:
        raise ValueError(
            f"step got {call.query_length} queries and {call.key_length} keys; every new token "
            "brings one of each"
        )


def _check_key_mask(call: Call) -> None:
    mask = call.key_mask
    if mask is None:
        return
    wanted = (call.k.shape[0], call.key_length)
    _check_tensor("key_mask", mask, "(batch, key_length)")
    if mask.dtype != torch.bool:
        raise ValueError(
            f"key_mask has dtype {mask.dtype}; it must be bool with True = attend: use "
            "key_mask.bool()"
        )
    if tuple(mask.shape) != wanted:
        raise ValueError(
            f"key_mask has shape {tuple(mask.shape)}; it must be (batch, key_length) = {wanted}"
        )
    _check_device("key_mask", mask, call)


#: Dtypes of an integer input.
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_segments(call: Call) -> None:
    """Raise a ValueError where the ids of pieces do not fit the call's keys."""
    ids = call.segments
    if ids is None:
        return
    _check_tensor("segments", ids, "(batch, key_length)")
    if ids.dtype not in INTEGERS:
        raise ValueError(
            f"segments has dtype {ids.dtype}; it holds the id of every token's piece as an integer "
            "dtype: use segments.long()"
        )
    wanted = (call.k.shape[0], call.key_length)
    if tuple(ids.shape) != wanted:
        raise ValueError(
            f"segments has shape {tuple(ids.shape)}; it must be (batch, key_length) = {wanted}"
        )
    _check_device("segments", ids, call)
    if call.offset < 0 and not call.is_causal:
        raise ValueError(
            f"segments names the pieces of {call.key_length} keys, and the first {-call.offset} of "
            f"{call.query_length} queries stand before all of them; give at most as many queries "
            "as keys"
        )


def _check_inputs(call: Call, spec: Spec) -> None:
    for name in call.inputs:
        if not spec.takes(name):
            _refuse(name, spec)
    sizes: dict[str, int] = {}
    if call.inputs:
        sizes |= zip(("batch", "heads", "queries", "width"), call.q.shape, strict=True)
        sizes |= zip(("kv_heads", "keys", "value_width"), call.v.shape[1:], strict=True)
    for one in spec.inputs:
        if one.name in call.inputs:
            _check_input(one, call.inputs[one.name], call, sizes)
        elif one.required:
            raise ValueError(
                f"{spec.name} needs {one.name}, ({', '.join(one.names)}): give the call "
                f"{one.name}=..."
            )


def _refuse(name: str, spec: Spec) -> None:
    """Raise on an input that the variant does not take."""
    if able := with_spec(lambda other: other.takes(name)):
        raise UnsupportedError(
            f"{spec.name} has no place for {name}: leave it out, or use {' or '.join(able)}"
        )
    known = [one.name for one in spec.inputs]
    takes = f"its inputs are {', '.join(known)}" if known else "it takes q, k, v and masks alone"
    others = {one.name: one for some in registered() for one in some.inputs}
    near = nearest(name, ["key_mask", "attn_mask", "is_causal", "segments", *known, *others])
    raise ValueError(f"{spec.name} has no input {name!r}{near}; {takes}")


def _check_input(one: Input, x: Tensor, call: Call, sizes: dict[str, int]) -> None:
    """sizes: of the axes that q, k and v have."""
    name = one.name
    if not isinstance(x, Tensor):
        _check_tensor(name, x, _listed(one.names))
    if one.dtype == "bool" and x.dtype != torch.bool:
        raise ValueError(f"{name} has dtype {x.dtype}; it must be bool: use {name}.bool()")
    if one.dtype == "int" and x.dtype not in INTEGERS:
        raise ValueError(f"{name} has dtype {x.dtype}; it must be an integer dtype, as torch.long")
    if one.dtype == "float" and not x.is_floating_point():
        raise ValueError(f"{name} has dtype {x.dtype}; it must be floating: use {name}.float()")
    if one.like is not None and x.dtype != call.q.dtype:
        raise ValueError(
            f"{name} has dtype {x.dtype} and {one.like} has {call.q.dtype}; they must agree: "
            "convert one of them"
        )
    shape, wanted = tuple(x.shape), [sizes.get(axis) for axis in one.names]
    if None in wanted:  # a free axis is as long as it is
        free = shape if len(shape) == len(wanted) else [FREE.get(axis) for axis in one.names]
        wanted = [own if size is None else size for size, own in zip(wanted, free, strict=True)]
    if shape != tuple(wanted):
        raise ValueError(
            f"{name} has shape {shape}; it must be {_listed(one.names)} = {_listed(wanted)}"
        )
    _check_device(name, x, call)


def _listed(parts: Sequence[object]) -> str:
    """As a tuple is written."""
    return f"({', '.join(map(str, parts))}{',' * (len(parts) == 1)})"


def _check_device(name: str, x: Tensor, call: Call) -> None:
    if x.device != call.q.device:
        raise ValueError(
            f"{name} is on {x.device} and q is on {call.q.device}; they must be on one device"
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
    _check_device("attn_mask", mask, call)


def _check_tensor(name: str, value: object, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} is a {type(value).__name__}; give a torch tensor of shape {shape}"
        )
