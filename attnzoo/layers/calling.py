"""One call of a layer: projections, what is done to queries and keys, the attention, and the way
back, for every layer that speaks torch's dialect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from einops import rearrange
from torch import Tensor

from attnzoo.layers.input_projections import inputs_of, weighed
from attnzoo.layers.layer import Layer
from attnzoo.layers.layer_checks import check_call
from attnzoo.layers.nested_sequences import forward_nested
from attnzoo.layers.options.output_gate import check_own_value_call, finished
from attnzoo.layers.options.short_convolution import (
    check_causal,
    check_convolved_call,
    check_one_sequence,
)
from attnzoo.layers.options.token_shift import GATE, TOKEN_SHIFT, Sources, shifted_sources
from attnzoo.layers.packed_model import segments_of
from attnzoo.layers.placement import Placement
from attnzoo.layers.positions import positions_of
from attnzoo.layers.projections import project, with_end_keys
from attnzoo.layers.torch_masks import translate
from attnzoo.sequences.segments import joined


def call_layer(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    need_weights: bool,
    average_attn_weights: bool,
    is_causal: bool,
    segments: Tensor | None,
    inputs: Mapping[str, Tensor | None],
) -> tuple[Tensor, Tensor | None]:
    """What `MultiheadAttention.forward` says of its arguments, for any layer. masks:
    key_padding_mask and attn_mask."""
    key_padding_mask, attn_mask = masks
    if query.is_nested or key.is_nested or value.is_nested:
        given = [name for name, x in inputs.items() if x is not None]
        if segments is not None or layer.segments is not None:
            given.append("segments")
        if given:
            raise ValueError(
                f"a nested tensor takes no {' and no '.join(given)}; pass padded tensors and "
                "masks instead"
            )
        return forward_nested(
            layer, query, key, value, masks, need_weights, average_attn_weights, is_causal
        )
    check_call(layer, query, key, value, key_padding_mask, attn_mask)
    batched = query.dim() == 3
    # The names of an input's leading axes, for einops; "1" is the batch that a 2-D input lacks.
    axes, batch = ("l", "1") if not batched else ("b l", "b") if layer.batch_first else ("l b", "b")
    pattern = f"{axes} (p h d) -> p {batch} h l d"
    segments = segments_of(layer, query, key, segments)
    sources = Sources(query, key, value)
    if TOKEN_SHIFT in layer._modules:
        sources = _shifted(layer, query, key, value, masks, is_causal, segments, axes)
    q, k, v = project(layer, sources.q, sources.k, sources.v, pattern)
    translated = translate(layer.attention.spec, q, k, key_padding_mask, attn_mask, is_causal)
    segments = joined(segments, translated.segments)
    check_convolved_call(layer, query, key, value, translated.is_causal)
    check_own_value_call(layer, query, key, value)
    positions = None
    if "rotary" in layer._modules:
        positions = positions_of(q, k, translated.key_mask, segments)
    placed = Placement(layer, positions, translated.key_mask, segments)
    q, k, v = placed(q, k, v)
    translated = translated.with_end_keys((layer.bias_k is not None) + layer.add_zero_attn, q, k)
    k, v = with_end_keys(layer, k, layer.bias_k), with_end_keys(layer, v, layer.bias_v)
    how: dict[str, Any] = {
        "key_mask": translated.key_mask,
        "attn_mask": translated.attn_mask,
        "is_causal": translated.is_causal,
        "segments": segments,
        **inputs_of(layer, sources, k, inputs, pattern, placed),
    }
    unweighed, (k, v) = v, weighed(layer, k, v, how, inputs)
    weights = translated.checked(layer.attention.weights(q, k, **how)) if need_weights else None
    out = translated.checked(layer.attention(q, k, v, **how))
    out = finished(layer, out, (q, k, unweighed), sources.others.get(GATE, query), pattern)
    out = layer.out_proj(rearrange(out, f"{batch} h l d -> {axes} (h d)"))
    if weights is not None and average_attn_weights:
        weights = weights.mean(1)
    return out, weights if weights is None or batched else weights.squeeze(0)


def _shifted(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    is_causal: bool,
    segments: Tensor | None,
    axes: str,
) -> Sources:
    """What the projections read by the layer's token shift, for which the masks are read before
    there are queries and keys."""
    what, batch = f"{TOKEN_SHIFT}=True", "b" if query.dim() == 3 else "1"
    check_one_sequence(what, query, key, value)
    like = rearrange(query, f"{axes} (h d) -> {batch} h l d", h=layer.num_heads)
    translated = translate(layer.attention.spec, like, like, *masks, is_causal)
    check_causal(what, translated.is_causal)
    segments = joined(segments, translated.segments)
    return shifted_sources(layer, query, axes, translated.key_mask, segments)
