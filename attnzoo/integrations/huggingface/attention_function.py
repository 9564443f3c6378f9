"""Hugging Face's attention function: an attention of the zoo behind the arguments that transformers
gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnzoo.attention import Attention
from attnzoo.call import Call, UnsupportedError
from attnzoo.conventions.watched import show
from attnzoo.eager import can_look, holds_anywhere, is_learned, is_recorded, may_branch
from attnzoo.engines.softmax.distance_bias import DISTANCE_BIAS, bias_between
from attnzoo.engines.softmax.reference import SINK_LOGITS
from attnzoo.engines.softmax.softmax import Softmax
from attnzoo.integrations.huggingface.masks.interface_masks import (
    SUBMODULE,
    filled_slots,
    mask_function_of,
)
from attnzoo.integrations.huggingface.masks.packed_rows import (
    ALWAYS_PACKED,
    check_positions,
    told_apart,
)
from attnzoo.integrations.huggingface.masks.read_once import read_once
from attnzoo.integrations.huggingface.projected_inputs import with_gates
from attnzoo.integrations.huggingface.returned_weights import (
    has_own_values,
    no_weights_of_a_state,
    through_weights,
    wants_weights,
)
from attnzoo.integrations.places import no_dropout
from attnzoo.sequences.masks import ReadMask, read_mask, visible_keys
from attnzoo.sequences.segments import joined

#: Attribute of the keys that a `StateCache` hands on: its layer, which has a state to step.
STATE_LAYER = "attnzoo_state_layer"
#: Arguments of a model's attention that change A and that no `Attention` takes.
CHANGES_WEIGHTS = ("sinks", "head_mask", "indices", "block_indices")


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function: transformers' arguments, the answer as (batch, length, heads,
    head_dim), and A where the model is asked for it.

    position_bias: (batch or 1, heads, query_length, key_length), or (heads, 2 · reach + 1) by
        distance.
    s_aux: (heads,), sink logits.
    softcap: what scores are kept within.
    """
    refuse_other_attention(module, kwargs)
    causal = call_is_causal(module, is_causal)
    state_layer = getattr(key, STATE_LAYER, None)
    distance_bias = None
    if position_bias is not None and position_bias.dim() == 2:
        position_bias, distance_bias = None, position_bias
    if attention_mask is not None and attention_mask.dtype == torch.int8:
        key, value, attention_mask, position_bias = filled_slots(
            key, value, attention_mask, position_bias
        )
    attention_mask, segments = told_apart(query, key, attention_mask, causal, kwargs)
    attention = getattr(module, SUBMODULE, None)
    if state_layer is not None:
        state_layer.check_reader(attention, causal)
    takes_distances = attention is not None and attention.spec.takes(DISTANCE_BIAS.name)
    if distance_bias is not None and not takes_distances:
        position_bias, distance_bias = _of_all_pairs(distance_bias, query, key), None
    if attention is None:
        out, weights = _attend_exactly(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout,
            scaling,
            causal,
            sliding_window,
            position_bias,
            s_aux,
            softcap,
            segments,
        )
    else:
        _check_softcap(module, attention, softcap)
        _set_dropout(module, attention, dropout)
        if scaling is not None and scaling != query.shape[-1] ** -0.5:
            query = query * (scaling * query.shape[-1] ** 0.5)
        given = {SINK_LOGITS.name: s_aux, DISTANCE_BIAS.name: distance_bias}
        key, value, gates = with_gates(module, attention, key, value)
        inputs = {**gates, **{name: x for name, x in given.items() if x is not None}}
        weights = no_weights_of_a_state
        try:
            if state_layer is not None:
                out = state_layer.step(query, key, value, attention_mask, segments, inputs)
            else:
                masks = _masks(
                    attention,
                    attention_mask,
                    position_bias,
                    causal,
                    sliding_window,
                    segments,
                    query,
                )
                out = attention(query, key, value, **masks, **inputs)
                weights = partial(attention.weights, query, key, **masks, **inputs)
        except UnsupportedError as error:
            if segments is None or not is_recorded():
                raise
            raise UnsupportedError(f"{error}. {ALWAYS_PACKED}") from None
    if segments is None and causal:
        out = check_positions(out, query, attention_mask, kwargs)
    shown = None
    if wants_weights(kwargs):
        shown = weights().to(query.dtype)
        if not (dropout and module.training) and not has_own_values(attention):
            out = through_weights(shown, value)
    return out.transpose(1, 2).contiguous(), shown


def _masks(
    attention: Attention,
    mask: Tensor | None,
    position_bias: Tensor | None,
    is_causal: bool,
    window: int | None,
    segments: Tensor | None,
    query: Tensor,
) -> dict[str, Any]:
    """The masks of a call of an attention of the zoo. A 4-D mask, which says itself what is causal,
    is read where the attention cannot apply it."""
    if mask is None or mask.dim() == 2:
        masks = {"key_mask": mask, "attn_mask": position_bias, "is_causal": is_causal}
        return {**masks, "segments": segments}
    if attention.spec.attn_mask:
        return {"attn_mask": _with_bias(mask, position_bias), "segments": segments}
    read = None
    if may_branch(mask) and not is_learned(mask):
        read = _read(mask, query.shape[0], query.shape[2], window)
    if read is None:
        raise UnsupportedError(
            f"{attention.spec.name} cannot apply a 4-D attention_mask that is more than causality, "
            "padding and packing, or whose values cannot be read here; give a 2-D one of the "
            "padding, or swap to standard"
        )
    return {
        "key_mask": read.key_mask,
        "attn_mask": position_bias,
        "is_causal": read.is_causal,
        "segments": joined(segments, read.segments),
    }


def _read(mask: Tensor, batch_size: int, query_length: int, window: int | None) -> ReadMask | None:
    """What a 4-D mask says; one row for all queries is of the padding alone."""

    def find() -> ReadMask | None:
        visible = visible_keys(mask)
        if visible is None:
            return None
        visible = visible.expand(batch_size, -1, -1, -1)
        if visible.shape[2] == query_length:
            return read_mask(visible, window)
        differs = holds_anywhere(visible != visible[:, :1])
        return None if differs else ReadMask(visible[:, 0, 0], False, None)

    return read_once(mask, None, (batch_size, query_length, window), find)


def call_is_causal(module: Any, given: bool | None) -> bool:
    """Whether a call is causal: as it says, or else as its module says."""
    if given is not None:
        return given
    return (
        bool(getattr(module, "is_causal", True))
        and getattr(module.config, "is_causal", True) is not False
    )


def refuse_other_attention(module: Any, kwargs: dict[str, Any]) -> None:
    """Raise UnsupportedError on arguments that a swapped attention would drop."""
    extra = [name for name in CHANGES_WEIGHTS if kwargs.get(name) is not None]
    if extra:
        raise UnsupportedError(
            f"{type(module).__name__} uses {' and '.join(extra)}, which a swapped attention would "
            "drop; this model cannot be swapped"
        )


def _attend_exactly(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool,
    window: int | None,
    position_bias: Tensor | None,
    s_aux: Tensor | None,
    softcap: float | None,
    segments: Tensor | None,
) -> tuple[Tensor, Callable[[], Tensor]]:
    """transformers' own SDPA, for a layer that was not swapped in a model that was; ours where
    there are sink logits or soft-capping, which theirs drops. Returns (batch, heads, length,
    head_dim), and what forms A."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    queries, keys = query.shape[2], key.shape[2]
    may_skip = window is None and segments is None
    may_skip &= mask is None or can_look(mask, may_stall=True)
    if mask is None or mask.dim() == 2:
        mask = sdpa_mask(
            batch_size=query.shape[0],
            q_length=queries,
            kv_length=keys,
            q_offset=keys - queries,
            mask_function=mask_function_of(is_causal, window, segments),
            attention_mask=mask,
            allow_is_causal_skip=is_causal and may_skip and queries == keys,
            allow_is_bidirectional_skip=not is_causal and may_skip,
            device=query.device,
        )
    elif segments is not None:
        mask = _with_bias(segments[:, None, :, None] == segments[:, None, None], mask)
    both, only_causal = (
        (position_bias, is_causal) if mask is None else (_with_bias(mask, position_bias), False)
    )
    call = Call(query, key, value, attn_mask=both, is_causal=only_causal)
    call = call if s_aux is None else call.giving(SINK_LOGITS, s_aux)
    weights = partial(Softmax(scaling, softcap=softcap).weights, call)
    show(module, weights)
    if s_aux is not None or softcap is not None:
        return Softmax(scaling, dropout, softcap=softcap)(call)[0], weights
    out, _ = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        position_bias=position_bias,
    )
    return out.transpose(1, 2), weights


def _with_bias(mask: Tensor, other: Tensor | None) -> Tensor:
    """A bool or additive mask and another mask that may be additive, as one."""
    if other is None:
        return mask
    if mask.dtype == torch.bool:
        return mask & other if other.dtype == torch.bool else other.masked_fill(~mask, -torch.inf)
    return mask + other


def _of_all_pairs(bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A bias by distance as one of all queries and keys, (1, heads, query_length, key_length)."""
    first, length = key.shape[2] - query.shape[2], key.shape[2]
    queries, keys = (torch.arange(start, length, device=bias.device) for start in (first, 0))
    return bias_between(bias, queries[:, None], keys)[None]


def _check_softcap(module: Any, attention: Attention, softcap: float | None) -> None:
    """Raise UnsupportedError where the model caps its scores otherwise than at the swap."""
    engine: Any = attention.engine
    built = getattr(engine, "softcap", None)
    if built != softcap:
        raise UnsupportedError(
            f"{type(module).__name__} caps its scores with softcap={softcap} now, and the "
            f"attention that was swapped in has softcap={built}; unswap, and swap again"
        )


def _set_dropout(module: Any, attention: Attention, dropout: float) -> None:
    engine: Any = attention.engine
    if attention.spec.dropout:
        if engine.training and engine.dropout != dropout:
            engine.dropout = dropout
    elif dropout:
        raise UnsupportedError(no_dropout(type(module).__name__, dropout, attention.spec.name))
