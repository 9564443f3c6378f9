"""Other libraries' ways to say where the pieces of a packed row stand, as `segments`: (batch,
length) int, the number of every token's piece."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from attnzoo.eager import can_look
from attnzoo.sequences.ordering import running_maximum, search

__all__ = ["from_cu_seqlens", "from_position_ids", "from_seq_idx", "starts_again"]


def from_cu_seqlens(cu_seqlens: Tensor, length: int | None = None) -> Tensor:
    """The segments of one flattened row, from the ends of its pieces (the flash-attention way).

    cu_seqlens: (pieces + 1,) integer, 0 and then the sum of the lengths after every piece
    length: tokens of the row; those behind the last piece are one more (None: there are none)
    returns: (1, length)
    raises: ValueError on ends that do not begin at 0, go down or pass the length
    """
    _check_integers("cu_seqlens", cu_seqlens, 1, "(pieces + 1,)")
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens is empty; it must begin with 0 and tell where each piece ends")
    if can_look(cu_seqlens, may_stall=True):
        _check_ends(cu_seqlens.tolist(), length)
    elif length is None:
        raise ValueError(
            "the values of cu_seqlens cannot be read in a graph, so it cannot tell how long the "
            "row is; give length="
        )
    total = int(cu_seqlens[-1]) if length is None else length
    slots = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return search(cu_seqlens[1:], slots, right=True)[None]


def _check_ends(ends: list[int], length: int | None) -> None:
    if ends[0] != 0:
        raise ValueError(f"cu_seqlens begins with {ends[0]}; it must begin with 0")
    for before, after in pairwise(ends):
        if after < before:
            raise ValueError(
                f"cu_seqlens goes down from {before} to {after}; it holds sums of lengths and must "
                "ascend"
            )
    if length is not None and ends[-1] > length:
        raise ValueError(
            f"cu_seqlens ends at {ends[-1]} and the row has {length} tokens; it must end at most "
            "there"
        )


def from_position_ids(position_ids: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """The segments of rows in which the positions start again with every piece.

    position_ids: (batch, length) integer; a token whose position is not above that of the token
        before it begins a piece
    key_mask: (batch, length) bool, True = a token, False = padding, whose positions say nothing
    returns: (batch, length)
    raises: ValueError on a tensor of another shape or dtype
    """
    _check_integers("position_ids", position_ids, 2, "(batch, length)")
    if key_mask is None:
        begins = torch.zeros_like(position_ids, dtype=torch.bool)
        begins[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
        return begins.cumsum(1)
    if key_mask.shape != position_ids.shape or key_mask.dtype != torch.bool:
        raise ValueError(
            f"key_mask has shape {tuple(key_mask.shape)} and dtype {key_mask.dtype}; it must be "
            f"bool and as position_ids, {tuple(position_ids.shape)}"
        )
    slots = torch.arange(position_ids.shape[1], device=position_ids.device)
    last = running_maximum(torch.where(key_mask, slots, -1))  # the last token up to a slot
    before = torch.cat([last.new_full((last.shape[0], 1), -1), last[:, :-1]], 1)
    of_before = position_ids.gather(1, before.clamp(min=0))
    return (key_mask & (before >= 0) & (position_ids <= of_before)).cumsum(1)


def from_seq_idx(seq_idx: Tensor, batch_size: int | None = None) -> Tensor:
    """The segments of rows whose pieces are numbered token by token (the Mamba way).

    seq_idx: (batch, length) integer, (1, length) for rows that are packed alike, or (length,)
    batch_size: rows (None: as many as seq_idx has)
    returns: (batch, length)
    raises: ValueError on a tensor of another shape or dtype
    """
    if isinstance(seq_idx, Tensor) and seq_idx.dim() == 1:
        seq_idx = seq_idx[None]
    _check_integers("seq_idx", seq_idx, 2, "(batch, length)")
    if batch_size is None or seq_idx.shape[0] == batch_size:
        return seq_idx
    if seq_idx.shape[0] != 1:
        raise ValueError(
            f"seq_idx has shape {tuple(seq_idx.shape)}; it must number the tokens of {batch_size} "
            "rows, or of one for all of them"
        )
    return seq_idx.expand(batch_size, -1)


def joined(segments: Tensor | None, others: Tensor | None) -> Tensor | None:
    """The segments, (batch, length), of tokens that meet where both say so."""
    if segments is None or others is None:
        return others if segments is None else segments
    others = others.long() - others.min()  # ids may be negative, and of a small dtype
    return segments.long() * (others.max() + 1) + others


def starts_again(position_ids: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Whether the positions of any row start again, a bool scalar: whether `from_position_ids`
    finds more than one piece."""
    if key_mask is None:
        return (position_ids[:, 1:] <= position_ids[:, :-1]).any()
    return (from_position_ids(position_ids, key_mask) > 0).any()


def _check_integers(name: str, x: Tensor, dims: int, shape: str) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}; give an integer tensor of shape {shape}")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(
            f"{name} has dtype {x.dtype}; it must be an integer tensor: use {name}.long()"
        )
    if x.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {shape}")
