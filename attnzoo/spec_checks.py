"""What a variant's spec excludes: one sentence each, with the variants that can do it."""

from __future__ import annotations

from typing import NoReturn

import torch

from attnzoo.arguments import check_positive
from attnzoo.call import Call, UnsupportedError
from attnzoo.spec import Spec, with_spec

LARGEST = 2**40  # batch sizes and lengths whose costs are counted


def check_features(call: Call, spec: Spec) -> None:
    """Raise UnsupportedError when the spec excludes the call."""
    check_causality(spec, call.is_causal)
    if call.attn_mask is not None and not spec.attn_mask:
        raise UnsupportedError(
            f"{spec.name} cannot apply an arbitrary attn_mask; use key_mask for padding, "
            f"is_causal=True for causality, or {others(attn_mask=True)}"
        )
    if call.query_length != call.key_length and not spec.cross:
        raise UnsupportedError(
            f"{spec.name} needs query_length == key_length (got {call.query_length} and "
            f"{call.key_length}); use {others(cross=True)}"
        )


def check_causality(spec: Spec, is_causal: bool) -> None:
    """Raise UnsupportedError when the spec excludes calls that are, or are not, causal."""
    if is_causal and not spec.causal:
        raise UnsupportedError(f"{spec.name} cannot be causal; use {others(causal=True)}")
    if not is_causal and not spec.bidirectional:
        raise UnsupportedError(
            f"{spec.name} is causal only; use {others(bidirectional=True)}, or "
            "is_causal=True where later keys may be hidden"
        )


def check_decodes(spec: Spec) -> None:
    """Raise UnsupportedError when the variant has no decoding state."""
    if not spec.decodes:
        raise UnsupportedError(
            f"{spec.name} does not decode token by token; use {others(decodes=True)}"
        )


def check_sizes(
    batch_size: int, query_length: int, key_length: int | None, dtype: torch.dtype
) -> None:
    """Raise ValueError on sizes and dtypes that no cost is counted for. key_length: None as in
    `Attention.cost`."""
    for name, value in (
        ("batch_size", batch_size),
        ("query_length", query_length),
        ("key_length", key_length),
    ):
        if value is not None and check_positive(name, value) > LARGEST:
            raise ValueError(
                f"{name}={value} is above {LARGEST}, the largest that costs are counted for"
            )
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f"dtype={dtype!r} is not a floating dtype; give one such as torch.bfloat16"
        )


def others(**wanted: bool) -> str:
    """Registered variants whose spec has what this one lacks, "a or b"."""
    return " or ".join(
        with_spec(lambda spec: all(getattr(spec, key) == x for key, x in wanted.items()))
    )


def refuse_scripting(spec: Spec) -> NoReturn:
    """Raise UnsupportedError: a forward chooses a backend in Python."""
    raise UnsupportedError(
        f"torch.jit.script cannot compile {spec.name}, nor a model that holds it, since its "
        "forward chooses a backend in Python; use torch.export.export, torch.compile or "
        "torch.jit.trace, or attnzoo.unswap before scripting"
    )
