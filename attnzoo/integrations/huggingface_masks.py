"""Hugging Face's masks: the padding alone, for an attention that knows causality and windows itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.call import UnsupportedError, can_look


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask function: the keys to attend to, (batch, filled slots) bool, or None when they are all of the kv_length slots."""
    filled = kv_length
    if is_causal_mask(mask_function):
        filled = int(q_offset) + q_length - kv_offset
    if attention_mask is None:
        return None if filled == kv_length else torch.ones(batch_size, filled, dtype=torch.bool, device=device)
    if attention_mask.shape[1] != filled:  # not cut to these slots before
        attention_mask = attention_mask[:, kv_offset : kv_offset + filled]
        attention_mask = nn.functional.pad(attention_mask, (0, filled - attention_mask.shape[1]), value=False)
    look = can_look(attention_mask, may_stall=True) and not (attention_mask.is_meta or torch.jit.is_tracing())
    return None if look and filled == kv_length and bool(attention_mask.all()) else attention_mask


def is_causal_mask(mask_function: Callable[..., Any] | None) -> bool:
    """Whether a mask function is causal; a mask that is more than causality and a window raises UnsupportedError."""
    from transformers import masking_utils

    if mask_function in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function):
        return mask_function is masking_utils.causal_mask_function  # the two that a compiled graph can tell
    causal = False
    for part in _parts(mask_function):
        if part in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function):
            causal |= part is masking_utils.causal_mask_function
        elif not getattr(part, "__qualname__", "").startswith(("sliding_window_overlay.", "sliding_window_bidirectional_overlay.")):
            raise UnsupportedError(
                "the model asks for a mask that is more than causality, padding and a window (packed sequences: position_ids that start "
                "again; chunks; blocks that see each other); attnzoo would drop it: give one sequence per row, and pad with attention_mask. "
                "A traced or compiled causal model always asks so unless it is given an attention_mask"
            )
    return causal


def _parts(mask_function: Any) -> Iterator[Any]:
    """The functions whose intersection a mask function is."""
    if getattr(mask_function, "__qualname__", "").startswith("and_masks."):
        for part in inspect.getclosurevars(mask_function).nonlocals["mask_functions"]:
            yield from _parts(part)
    else:
        yield mask_function


def mask_function_of(is_causal: bool, window: int | None) -> Callable[..., Any]:
    """transformers' mask function for causality and a window of keys, the query's own included."""
    from transformers import masking_utils

    if window is None:
        return masking_utils.causal_mask_function if is_causal else masking_utils.bidirectional_mask_function
    if is_causal:
        return masking_utils.sliding_window_causal_mask_function(window)
    return masking_utils.sliding_window_bidirectional_mask_function(window - 1)  # theirs counts the distance, inclusive
