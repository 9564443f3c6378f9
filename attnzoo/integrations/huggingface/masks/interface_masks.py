"""Hugging Face's masks: the padding alone, for an attention that knows causality and windows
itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.call import UnsupportedError
from attnzoo.eager import can_look
from attnzoo.integrations.huggingface.masks.packed_rows import (
    PIECES,
    read_in_graph,
    read_mask_function,
)

#: What the mask of a static cache holds where no token has been written yet; elsewhere 1 is attend
#: and 0 is padding.
UNFILLED = -1
#: Families that make masks by the implementation that their config names, and whose attention does
#: not go by it.
WITHOUT_INTERFACE = ("bloom", "falcon", "mpt")
#: Where in a model's own attention module the zoo's attention lives.
SUBMODULE = "attention_core"


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
    """The mask function: the keys to attend to, (batch, kv_length) bool, or None when they are all
    of them.

    A static cache has slots that are not filled yet, behind those that are: the mask is then int8,
    with `UNFILLED` there, and as long at every step, so that a compiled graph serves them all.
    For packed rows it is `PIECES`, the number of every token's piece.
    """
    causal, pieces = _read(mask_function, batch_size, q_length, attention_mask, device, kwargs)
    if pieces is not None:
        return pieces.to(PIECES)
    filled = q_offset + q_length - kv_offset if causal else kv_length
    whole = not isinstance(filled, Tensor) and filled == kv_length
    _refuse_unswapped(kwargs.get("config"))
    is_turned = _turns_into_bool(kwargs.get("config"))
    # In a trace every length is a tensor.
    if is_turned and not whole and not torch.jit.is_tracing():
        raise UnsupportedError(
            "this model makes a bool of every mask, which cannot tell of slots of a static cache "
            "that are not filled yet; use another cache"
        )
    if attention_mask is None:
        if whole and not is_turned:
            return None
        attention_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    if attention_mask.shape[1] != kv_length:  # not cut to these slots before
        attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length]
        attention_mask = nn.functional.pad(
            attention_mask, (0, kv_length - attention_mask.shape[1]), value=False
        )
    if not whole:
        unfilled = torch.arange(kv_length, device=attention_mask.device) >= filled
        return attention_mask.to(torch.int8).masked_fill(unfilled, UNFILLED)
    return (
        None
        if not is_turned and can_look(attention_mask, may_stall=True) and bool(attention_mask.all())
        else attention_mask
    )


def _refuse_unswapped(config: Any) -> None:
    """Raise UnsupportedError on a model whose own attention would read a mask of ours: one that was
    built with the config of a swapped model, or a copy of it.

    A mask function is told of no model, so it looks for the one whose forward asks.
    """
    family = getattr(config, "model_type", None)
    if family not in WITHOUT_INTERFACE or torch.compiler.is_compiling():
        return
    frame = inspect.currentframe()
    while frame is not None:
        model: Any = frame.f_locals.get("self")
        if frame.f_code.co_name == "forward" and hasattr(model, "base_model_prefix"):
            if any(SUBMODULE in part._modules for part in model.modules()):
                return
            raise UnsupportedError(
                f"this {family} model is not swapped and has the config of one that is; build it "
                "with another config, or set config._attn_implementation = 'eager' first"
            )
        frame = frame.f_back


def _turns_into_bool(config: Any) -> bool:
    """Whether a model calls `.to(torch.bool)` on its mask, which must be a tensor then."""
    return getattr(config, "model_type", None) == "mpt"


def _read(
    mask_function: Callable[..., Any] | None,
    batch_size: int,
    length: int,
    attention_mask: Tensor | None,
    device: torch.device | str,
    kwargs: dict[str, Any],
) -> tuple[bool, Tensor | None]:
    """Whether the mask is causal, and the pieces of packed rows, (batch, length), if any."""
    from transformers import masking_utils

    if mask_function in (
        masking_utils.causal_mask_function,
        masking_utils.bidirectional_mask_function,
    ):
        return mask_function is masking_utils.causal_mask_function, None
    if torch.compiler.is_dynamo_compiling():
        packed = attention_mask is None
        return read_in_graph(mask_function, batch_size, length, packed, device, **kwargs)
    return read_mask_function(mask_function)


def filled_slots(
    key: Tensor, value: Tensor, mask: Tensor, position_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Keys, values, mask and bias whose last slot is the last that is filled: without the unfilled
    ones, or with these as padding on the left where their number may not be looked at.

    mask: (batch, slots) int8, as `padding_mask` gives it.
    """
    unfilled = (mask[0] == UNFILLED).sum()
    if can_look(mask):
        cut = slice(0, mask.shape[1] - int(unfilled))
        bias = None if position_bias is None else position_bias[..., cut]
        return key[:, :, cut], value[:, :, cut], mask[:, cut] > 0, bias
    order = (torch.arange(mask.shape[1], device=mask.device) - unfilled) % mask.shape[1]
    bias = None if position_bias is None else position_bias.index_select(-1, order)
    return (
        key.index_select(2, order),
        value.index_select(2, order),
        mask.index_select(1, order) > 0,
        bias,
    )


def mask_function_of(
    is_causal: bool, window: int | None, segments: Tensor | None
) -> Callable[..., Any]:
    """transformers' mask function for causality, a window of keys, the query's own included, and
    pieces that do not meet."""
    from transformers import masking_utils

    if segments is not None:
        return masking_utils.and_masks(
            masking_utils.packed_sequence_mask_function(segments),
            mask_function_of(is_causal, window, None),
        )
    if window is None:
        return (
            masking_utils.causal_mask_function
            if is_causal
            else masking_utils.bidirectional_mask_function
        )
    if is_causal:
        return masking_utils.sliding_window_causal_mask_function(window)
    # Theirs counts the distance, inclusive.
    return masking_utils.sliding_window_bidirectional_mask_function(window - 1)
