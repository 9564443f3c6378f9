"""Hugging Face's packed rows: what its models and collators say of several pieces in one row, as
the segments of a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import UnsupportedError
from attnzoo.eager import can_look, holds_anywhere, is_recorded, may_branch, refuse_later
from attnzoo.integrations.huggingface.masks.read_once import read_once
from attnzoo.sequences.segments import (
    from_cu_seqlens,
    from_position_ids,
    from_seq_idx,
    starts_again,
)

#: Dtype of the mask of a packed row: (batch, length), the number of every token's piece.
PIECES = torch.int32
#: The way out where a model cannot tell its attention that positions start again.
UNPADDED = "give packed rows without attention_mask and with use_cache=False"
#: Why a call that is refused in a graph may be packed though its caller packs nothing.
ALWAYS_PACKED = (
    "transformers takes the rows of every causal model that is traced or compiled for packed ones "
    "unless it is given an attention_mask: give one, of ones where nothing is padding"
)
MORE = (
    "the model asks for a mask that is more than causality, padding, packing and a window (chunks; "
    "blocks that see each other); attnzoo would drop it, so this call runs without the swap only"
)


def told_apart(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, kwargs: Mapping[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """The mask of a call of the attention function without packing, and the segments of its rows,
    (batch, length), where they are packed.

    mask: (batch, length) bool, or `PIECES` of packed rows, or 4-D
    kwargs: what the model gave beside q, k, v and the mask: cu_seq_lens_q and cu_seq_lens_k,
        seq_idx, or position_ids that start again, of which a 4-D mask knows better
    """
    if mask is None or mask.dim() == 2:
        pieces = mask if mask is not None and mask.dtype == PIECES else None
        key_mask = None if pieces is not None else mask
        told = _told(query, key, kwargs)
        if told is None and pieces is None and is_causal:
            told = _from_positions(query, key, key_mask, kwargs)
        return key_mask, pieces if told is None else told
    return mask, _told(query, key, kwargs)


def _told(query: Tensor, key: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The segments that the call is told in so many words."""
    ends, numbers = kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")
    if ends is not None or kwargs.get("cu_seq_lens_k") is not None:
        _check_square("cu_seq_lens_q", query, key)
        return _from_ends(ends, kwargs.get("cu_seq_lens_k"), query.shape[0], key.shape[2])
    if numbers is not None:
        _check_square("seq_idx", query, key)
        return from_seq_idx(numbers, query.shape[0])
    return None


def _from_positions(
    query: Tensor, key: Tensor, key_mask: Tensor | None, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """The segments of rows whose positions start again."""
    positions = _positions(query, kwargs)
    if positions is None:
        return None
    new = _of_new(key_mask, query)
    if not _may_read(positions, new):
        return None  # `check_positions` sees to it that they do not start again

    def find() -> Tensor | None:
        if not holds_anywhere(positions[:, 1:] <= positions[:, :-1]):
            return None
        segments = from_position_ids(positions.expand(query.shape[0], -1), new)
        return segments if holds_anywhere(segments > 0) else None

    segments = read_once(positions, key_mask, query.shape[0], find)
    if segments is not None:
        _check_square("position_ids that start again", query, key)
    return segments


def check_positions(
    out: Tensor, query: Tensor, key_mask: Tensor | None, kwargs: Mapping[str, Any]
) -> Tensor:
    """The output of a causal call without segments, refused where a graph's position_ids, which
    `told_apart` could not read, turn out to start again."""
    positions = None if key_mask is not None and key_mask.dim() == 4 else _positions(query, kwargs)
    new = _of_new(key_mask, query)
    if positions is None or not is_recorded() or _may_read(positions, new):
        return out
    return refuse_later(
        out,
        ~starts_again(positions.expand(query.shape[0], -1), new),
        "position_ids start again, which tells of packed rows, and in a graph the attention "
        f"cannot read them beside a mask or a cache; {UNPADDED}",
    )


def refuse_unseen_packing(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise UnsupportedError where position_ids start again, in a model that does not hand them to
    its attention, and transformers does not make a mask of them either."""
    given = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
    positions, mask, cache = (
        given.get(name) for name in ("position_ids", "attention_mask", "use_cache")
    )
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] == 1:
        return
    cached = model.config.use_cache if cache is None else cache
    if mask is None and not cached and given.get("past_key_values") is None:
        return
    if isinstance(mask, Tensor) and mask.dim() == 4:
        return
    key_mask = None if mask is None else mask[:, mask.shape[1] - positions.shape[1] :].bool()
    again = starts_again(
        positions.expand(len(mask), -1) if mask is not None else positions, key_mask
    )
    message = (
        f"position_ids start again, which tells of packed rows, and {type(model).__name__} does "
        f"not hand them to its attention; {UNPADDED}"
    )
    if not _may_read(positions, key_mask):
        refuse_later(torch.zeros((), device=positions.device), ~again, message)
    elif holds_anywhere(again):
        raise UnsupportedError(message)


def _of_new(key_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """The part of (batch, key_length) of the queries' own slots."""
    return None if key_mask is None else key_mask[:, key_mask.shape[1] - query.shape[2] :]


def _may_read(positions: Tensor, key_mask: Tensor | None) -> bool:
    return may_branch(positions) and (key_mask is None or may_branch(key_mask))


def _positions(query: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The position_ids of a call's tokens, (batch or 1, query_length), where they may start
    again."""
    positions = kwargs.get("position_ids")
    batch_size, length = query.shape[0], query.shape[2]
    if not isinstance(positions, Tensor) or positions.dim() != 2 or length == 1:
        return None
    if positions.shape[1] != length or positions.shape[0] not in (1, batch_size):
        return None
    return positions


def _from_ends(ends: Any, of_keys: Any, batch_size: int, length: int) -> Tensor:
    """The segments of the flattening collator's ends of pieces, in queries and in keys."""
    if ends is None or of_keys is None:
        given = "cu_seq_lens_q" if of_keys is None else "cu_seq_lens_k"
        raise UnsupportedError(
            f"{given} came without its partner; give cu_seq_lens_q and cu_seq_lens_k both"
        )
    readable = ends is not of_keys and can_look(ends, of_keys, may_stall=True)
    if ends.shape != of_keys.shape or (readable and not torch.equal(ends, of_keys)):
        raise UnsupportedError(
            "cu_seq_lens_q and cu_seq_lens_k differ; a swapped attention packs queries and keys "
            "alike, so give one tensor for both"
        )
    if batch_size != 1:
        raise UnsupportedError(
            f"cu_seq_lens_q came with {batch_size} rows; it tells of one flattened row, so give "
            "tensors of (1, total length)"
        )
    return from_cu_seqlens(ends, length)


def _check_square(what: str, query: Tensor, key: Tensor) -> None:
    if query.shape[2] != key.shape[2]:
        raise UnsupportedError(
            f"{what} came with {query.shape[2]} queries and {key.shape[2]} keys; a packed row must "
            "be read in one forward, with no cached tokens before it"
        )


def read_mask_function(mask_function: Callable[..., Any] | None) -> tuple[bool, Tensor | None]:
    """Whether a mask function is causal, and the pieces of the packed rows that it tells of,
    (batch, length), if any; a mask that is more than these and a window raises UnsupportedError."""
    from transformers import masking_utils

    causal_or_not = {
        masking_utils.causal_mask_function: True,
        masking_utils.bidirectional_mask_function: False,
    }
    causal, pieces = False, None
    for part in _parts(mask_function):
        name = getattr(part, "__qualname__", "")
        if part in causal_or_not:
            causal |= causal_or_not[part]
        elif name.startswith("packed_sequence_mask_function."):
            pieces = inspect.getclosurevars(part).nonlocals["packed_sequence_mask"]
        elif not name.startswith(
            ("sliding_window_overlay.", "sliding_window_bidirectional_overlay.")
        ):
            raise UnsupportedError(MORE)
    return causal, pieces


def read_in_graph(
    mask_function: Any, batch_size: int, length: int, is_packed: bool, device: Any, **kwargs: Any
) -> tuple[bool, Tensor | None]:
    """As `read_mask_function` where torch.compile follows, which shows of a function its name
    alone.

    is_packed: whether the call is one in which transformers looks for packed rows.
    kwargs: what transformers gives a mask function beside.
    """
    chunks = getattr(kwargs.get("config"), "attention_chunk_size", None)
    name = mask_function.__qualname__
    if not name.startswith("and_masks.") or kwargs.get("use_vmap") or chunks is not None:
        raise UnsupportedError(MORE)
    causal = "allow_is_bidirectional_skip" not in kwargs
    if not causal or not is_packed:
        return causal, None
    rows = torch.arange(batch_size, device=device)[:, None]
    slots = torch.arange(length, device=device)[None]
    # Causality and a window show a token the one before it, unless that is of another piece
    goes_on = mask_function(rows, torch.zeros_like(rows), slots[:, 1:], slots[:, :-1])
    return True, torch.nn.functional.pad(~goes_on, (1, 0)).cumsum(1)


def _parts(mask_function: Any) -> Iterator[Any]:
    """The functions whose intersection a mask function is."""
    name, inner = getattr(mask_function, "__qualname__", ""), []
    if name.startswith("and_masks."):
        inner = inspect.getclosurevars(mask_function).nonlocals["mask_functions"]
    elif name.startswith("remap_positions_for_packed_sequence."):
        # Within a piece, positions that go up by one are slots, and what is asked is their distance
        inner = [inspect.getclosurevars(mask_function).nonlocals["mask_function"]]
    else:
        yield mask_function
    for part in inner:
        yield from _parts(part)
