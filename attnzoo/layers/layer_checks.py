"""What `MultiheadAttention` refuses: options that contradict its core, tensors that do not fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.call import UnsupportedError
from attnzoo.eager import is_recorded
from attnzoo.layers.layer import Layer, shares_qk
from attnzoo.layers.torch_masks import check_mask
from attnzoo.spec import Spec


def core_options(
    spec: Spec, dropout: float, extra_keys: bool, options: dict[str, Any]
) -> dict[str, Any]:
    """The core's options, refused where they contradict the module's or exceed the core's spec."""
    for option, source in (
        ("heads", "num_heads"),
        ("head_dim", "embed_dim // num_heads"),
        ("dropout", "dropout"),
    ):
        if option in options:
            raise ValueError(f"attention_options must not set {option!r}: it follows from {source}")
    if dropout and not spec.dropout:
        raise UnsupportedError(no_dropout(spec, dropout))
    if extra_keys and not (spec.exact and spec.family == "exact" and spec.attn_mask):
        raise UnsupportedError(
            f"add_bias_kv and add_zero_attn append a key that every query sees, which {spec.name} "
            "cannot place; leave both False,"
            " or use attention='standard'"
        )
    return {**options, "dropout": dropout} if spec.dropout else options


def no_dropout(spec: Spec, dropout: float) -> str:
    """The sentence that refuses dropout to a core that has none."""
    return (
        f"dropout={dropout} drops entries of the attention matrix, which {spec.name} never forms; "
        "build with dropout=0.0 (dropout"
        f" outside attention, in a Transformer layer, is separate), or use attention='standard'"
    )


def check_call(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> None:
    """Raise ValueError, with the argument's name, where a call's tensors do not fit the layer."""
    if layer.training and layer.dropout and not layer.attention.spec.dropout:
        raise UnsupportedError(no_dropout(layer.attention.spec, layer.dropout))
    # The module's own: what a layer in it computes with (integers, what a hook brings) is that
    # layer's affair.
    weight = layer.q_proj_weight if layer.in_proj_weight is None else layer.in_proj_weight
    for name, x, width in (
        ("query", query, layer.embed_dim),
        ("key", key, layer.kdim),
        ("value", value, layer.vdim),
    ):
        if x.dim() not in (2, 3) or x.dim() != query.dim():
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; query, key and value must all be batched "
                "(3-D) or all unbatched (2-D)"
            )
        if x.shape[-1] != width:
            raise ValueError(
                f"{name} has {x.shape[-1]} features (shape {tuple(x.shape)}); this module was "
                f"built for {width}"
            )
        if weight is None or not weight.is_floating_point():
            continue
        if x.device != weight.device:
            raise ValueError(
                f"{name} is on {x.device} and the module on {weight.device}; move one of them"
            )
        if x.dtype != weight.dtype and not (
            x.is_floating_point() and torch.is_autocast_enabled(x.device.type)
        ):
            raise ValueError(
                f"{name} has dtype {x.dtype} and the module {weight.dtype}; convert one of them"
            )
    if (
        shares_qk(layer) and query is not key and not is_recorded()
    ):  # there one tensor may come in twice as two
        raise ValueError(
            f"query and key must be one tensor: {layer.attention.spec.name} shares them; build "
            "the core without that"
        )
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"key has shape {tuple(key.shape)} and value {tuple(value.shape)}; all but the "
            "features must agree"
        )
    batched, length_axis = query.dim() == 3, int(query.dim() == 3 and layer.batch_first)
    if batched and query.shape[1 - length_axis] != key.shape[1 - length_axis]:
        layout = (
            "(batch, length, features)"
            if layer.batch_first
            else "(length, batch, features), since batch_first=False"
        )
        raise ValueError(
            f"query has shape {tuple(query.shape)} and key {tuple(key.shape)}; their batch "
            f"sizes must agree in {layout}"
        )
    lengths = (query.shape[length_axis], key.shape[length_axis])
    sizes = (query.shape[1 - length_axis],) if batched else ()
    check_mask("key_padding_mask", key_padding_mask, [(*sizes, lengths[1])], query.device)
    check_mask(
        "attn_mask",
        attn_mask,
        [lengths, (layer.num_heads * (sizes[0] if sizes else 1), *lengths)],
        query.device,
    )
