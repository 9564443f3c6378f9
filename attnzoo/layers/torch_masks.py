"""torch.nn.MultiheadAttention's masks in this library's dialect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.attention import Spec
from attnzoo.call import UnsupportedError
from attnzoo.eager import holds_anywhere, is_learned, may_branch, refuse_later
from attnzoo.engines.softmax.reference import causal_mask
from attnzoo.sequences.masks import ReadMask, read_mask, visible_keys


def check_mask(
    name: str, mask: Tensor | None, shapes: list[tuple[int, ...]], device: torch.device
) -> None:
    """Raise a ValueError unless the mask has one of these shapes, is bool or floating, and is on
    the device."""
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"{name} has dtype {mask.dtype}; it must be bool (True = ignore) or floating (added to "
            f"the scores): use {name}.bool()"
        )
    if not any(_are_equal(mask.shape, shape) for shape in shapes):
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}; it must be "
            f"{' or '.join(map(str, dict.fromkeys(shapes)))}"
        )
    if mask.device != device:
        raise ValueError(
            f"{name} is on {mask.device} and the module on {device}; they must be on one device"
        )


def _are_equal(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Number by number: in a graph of symbolic lengths `shape in shapes` finds none."""
    same = (a == b for a, b in zip(shape, other, strict=True))
    return len(shape) == len(other) and all(same)


@dataclass(frozen=True)
class Masks:
    """The masks in this library's dialect: True = attend; see `attnzoo.Attention.forward`.

    conditions: what must turn out True of masks whose values could not be read, with what is said
    where it does not.
    """

    key_mask: Tensor | None
    attn_mask: Tensor | None
    is_causal: bool
    conditions: tuple[tuple[Tensor, str], ...] = ()
    segments: Tensor | None = None

    def checked(self, out: Tensor) -> Tensor:
        """What was computed under these masks, refused where a condition turns out False."""
        for condition, message in self.conditions:
            out = refuse_later(out, condition, message)
        return out

    def with_end_keys(self, count: int, q: Tensor, k: Tensor) -> Masks:
        """The masks once `count` keys that every query sees are appended to k; causality, which
        would hide them, becomes a mask."""
        if count == 0:
            return self
        if self.segments is not None:
            raise UnsupportedError(
                "add_bias_kv and add_zero_attn append keys that belong to no piece of the packed "
                "rows that attn_mask tells of; build the layer without them, or use "
                "attention='standard'"
            )
        mask = self.attn_mask
        if self.is_causal:
            past = causal_mask(q.shape[2], k.shape[2], q.device)
            mask = (
                past
                if mask is None
                else mask & past
                if mask.dtype == torch.bool
                else mask.masked_fill(~past, float("-inf"))
            )
        key_mask = None if self.key_mask is None else F.pad(self.key_mask, (0, count), value=True)
        if mask is not None:
            mask = F.pad(mask, (0, count), value=True if mask.dtype == torch.bool else 0.0)
        return Masks(key_mask, mask, False, self.conditions)


def translate(
    spec: Spec,
    q: Tensor,
    k: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> Masks:
    """torch's masks in this library's dialect. q, k: projected, (batch, heads, length,
    head_dim)."""
    conditions: list[tuple[Tensor, str]] = []
    key_mask, bias = _split_padding(spec, key_padding_mask, q, conditions)
    mask, read = _split_causality(spec, attn_mask, is_causal, q, k, conditions)
    if read.key_mask is not None:
        key_mask = read.key_mask if key_mask is None else key_mask & read.key_mask
    if mask is not None:
        mask = ~mask if mask.dtype == torch.bool else mask.to(q.dtype)
    if bias is not None and mask is not None:
        mask = bias + mask if mask.is_floating_point() else bias.masked_fill(~mask, float("-inf"))
    added = bias if mask is None else mask
    return Masks(key_mask, added, read.is_causal, tuple(conditions), read.segments)


def _split_padding(
    spec: Spec, mask: Tensor | None, q: Tensor, conditions: list[tuple[Tensor, str]]
) -> tuple[Tensor | None, Tensor | None]:
    """The keys to attend to, (batch, key_length) bool, and what a float mask adds to their scores,
    (batch, 1, 1, key_length), if anything."""
    if mask is None:
        return None, None
    mask = mask if mask.dim() == 2 else mask[None]
    if mask.dtype == torch.bool:
        return ~mask, None
    key_mask = mask != float("-inf")
    bias = mask.masked_fill(~key_mask, 0.0)
    if may_branch(mask) and not is_learned(mask) and not holds_anywhere(bias != 0):
        return key_mask, None
    if spec.attn_mask:
        return key_mask, bias.to(q.dtype)[:, None, None, :]
    refusal = (
        f"{spec.name} cannot add a float key_padding_mask to its scores; give a bool one (True = "
        "ignore) or one of 0 and -inf only"
    )
    if may_branch(mask):
        raise UnsupportedError(refusal)
    conditions.append((~bias.any(), refusal))
    return key_mask, None


def _split_causality(
    spec: Spec,
    mask: Tensor | None,
    is_causal: bool,
    q: Tensor,
    k: Tensor,
    conditions: list[tuple[Tensor, str]],
) -> tuple[Tensor | None, ReadMask]:
    """The mask, in torch's dialect and 4-D, where it must be applied as it is, and what is known
    without it: a mask that is the causal mask becomes is_causal, and for an attention that takes
    none, one of causality, padding and packing becomes these."""
    if mask is None:
        return None, ReadMask(None, is_causal, None)
    query_length, key_length = q.shape[2], k.shape[2]
    mask = mask.unflatten(0, q.shape[:2]) if mask.dim() == 3 else mask[None, None]
    hidden = ~causal_mask(query_length, key_length, mask.device)
    causal = (
        hidden
        if mask.dtype == torch.bool
        else torch.zeros_like(hidden, dtype=mask.dtype).masked_fill(hidden, float("-inf"))
    )
    readable = may_branch(mask) and not is_learned(mask)
    if readable and not holds_anywhere(mask != causal):
        return None, ReadMask(None, True, None)
    if spec.attn_mask:
        return mask, ReadMask(None, bool(is_causal and query_length == key_length), None)
    refusal = (
        f"{spec.name} cannot apply an attn_mask that is more than causality, padding and packing; "
        "use key_padding_mask for padding, or attention='standard'"
    )
    if may_branch(mask):
        visible = visible_keys(~mask if mask.dtype == torch.bool else mask) if readable else None
        read = None if visible is None else read_mask(visible.expand(len(q), -1, -1, -1))
        if read is None:
            raise UnsupportedError(refusal)
        adds = is_causal and query_length == key_length  # as for an attention that takes masks
        return None, replace(read, is_causal=read.is_causal or adds)
    if not is_causal:
        raise UnsupportedError(
            f"{refusal}. The values of this one cannot be read here: if it is the causal mask, say "
            "so with is_causal=True"
        )
    conditions.append(((mask == causal).all(), refusal))
    return None, ReadMask(None, True, None)
