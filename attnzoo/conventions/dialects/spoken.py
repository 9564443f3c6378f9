"""The dialects that a callable can be checked in."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attnzoo.arguments import check_choice
from attnzoo.conventions.dialects.dialect import Asked, Dialect, NotExpressible
from attnzoo.conventions.dialects.layers import layer_rows, layer_sizes

#: By this library's name of an input: what flash-linear-attention's operators call it.
FLA_NAMES = {"log_decay": ("g", "gk", "w"), "beta": ("beta",)}


def attnzoo(function: Callable[..., Any], given: Asked) -> Tensor:
    """f(q, k, v, is_causal=, key_mask=, segments=, **inputs), (batch, heads, length, head_dim). A
    mask that hides nothing is left out."""
    masks = {"key_mask": given.key_mask, "segments": given.segments}
    masks = {name: x for name, x in masks.items() if x is not None}
    causal = {"is_causal": True} if given.is_causal else {}
    return function(given.q, given.k, given.v, **causal, **masks, **given.inputs)


def sdpa(function: Callable[..., Any], given: Asked) -> Tensor:
    """torch's scaled_dot_product_attention: f(q, k, v, attn_mask=, is_causal=), True = attend. Its
    is_causal starts at the first key, so that fewer queries than keys need a mask."""
    _refuse_inputs(given, "sdpa")
    mask = visible(given)
    group = {"enable_gqa": True} if given.q.shape[1] != given.k.shape[1] else {}
    square = given.q.shape[2] == given.k.shape[2]
    if given.is_causal and square and given.key_mask is None and given.segments is None:
        return function(given.q, given.k, given.v, is_causal=True, **group)
    return function(given.q, given.k, given.v, attn_mask=mask, **group)


def transformers(function: Callable[..., Any], given: Asked) -> Tensor:
    """An attention function of transformers: f(module, query, key, value, attention_mask, scaling=,
    dropout=), with an additive mask; it returns rows of (batch, length, heads, head_dim) and A.
    Scores and A are rounded to the dtype."""
    _refuse_inputs(given, "transformers")
    mask = visible(given)
    module = SimpleNamespace(
        num_key_value_groups=given.q.shape[1] // given.k.shape[1],
        is_causal=given.is_causal,
        training=False,
        config=SimpleNamespace(_attn_implementation="eager"),
        layer_idx=0,
    )
    additive = None if mask is None else _additive(mask, given.q.dtype)
    scaling = given.q.shape[3] ** -0.5
    answer = function(module, given.q, given.k, given.v, additive, scaling=scaling, dropout=0.0)
    rows = answer[0] if isinstance(answer, tuple) else answer
    return rows.transpose(1, 2)


def transformers_layer(function: Callable[..., Any], given: Asked) -> Tensor:
    """An attention layer of transformers: layer(hidden_states, attention_mask=,
    position_embeddings=), whose projections give q, k and v as they are, at position 0."""
    _refuse_inputs(given, "transformers_layer")
    mask = visible(given)
    if mask is None:  # else the layer makes one, causal or not, as its model has it
        shape = (given.q.shape[0], 1, given.q.shape[2], given.k.shape[2])
        mask = torch.ones(shape, dtype=torch.bool, device=given.q.device)
    return layer_rows(function, given, _additive(mask, given.q.dtype))


def fla(function: Callable[..., Any], given: Asked) -> Tensor:
    """An operator of flash-linear-attention: f(q=, k=, v=, g=, beta=, output_final_state=), or
    query=, key=, value=, (batch, length, heads, head_dim), by names, since their order is not the
    same everywhere; it returns rows and a state."""
    return _fla_rows(function, given, head_first=False)


def fla_head_first(function: Callable[..., Any], given: Asked) -> Tensor:
    """An operator of flash-linear-attention that is called so, but with (batch, heads, length,
    head_dim), as some of its naive functions are."""
    return _fla_rows(function, given, head_first=True)


def flash_attn(function: Callable[..., Any], given: Asked) -> Tensor:
    """flash-attn's functions: f(q, k, v, causal=), (batch, length, heads, head_dim), the last query
    beside the last key."""
    _refuse_inputs(given, "flash_attn")
    _refuse_masks(given, "flash_attn")
    q, k, v = (x.transpose(1, 2) for x in (given.q, given.k, given.v))
    answer = function(q, k, v, causal=given.is_causal)
    return (answer[0] if isinstance(answer, tuple) else answer).transpose(1, 2)


def visible(given: Asked) -> Tensor | None:
    """What the masks of a call say of every pair, (batch, 1, query_length, key_length) bool, True =
    attend; None: nothing is hidden."""
    queries, keys = given.q.shape[2], given.k.shape[2]
    mask = torch.ones(given.q.shape[0], 1, queries, keys, dtype=torch.bool, device=given.q.device)
    if given.is_causal:
        mask = mask.tril(keys - queries)
    if given.key_mask is not None:
        mask = mask & given.key_mask[:, None, None]
    if given.segments is not None:
        of_queries = given.segments[:, keys - queries :]
        mask = mask & (of_queries[:, None, :, None] == given.segments[:, None, None])
    return None if bool(mask.all()) else mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores, as transformers has it."""
    lowest = torch.finfo(dtype).min
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, lowest)


def _fla_rows(function: Callable[..., Any], given: Asked, *, head_first: bool) -> Tensor:
    answer = _fla(function, given, head_first)
    rows = answer[0] if isinstance(answer, tuple) else answer
    return rows if head_first else rows.transpose(1, 2)


def _fla_state(head_first: bool) -> Callable[[Callable[..., Any], Asked], Tensor]:
    def final_state(function: Callable[..., Any], given: Asked) -> Tensor:
        if "output_final_state" not in inspect.signature(function).parameters:
            raise NotExpressible("this operator has no argument output_final_state")
        return _fla(function, given, head_first, output_final_state=True)[1]

    return final_state


def _fla(function: Callable[..., Any], given: Asked, head_first: bool, **told: Any) -> Any:
    """All that an operator answers."""
    _refuse_masks(given, "fla")
    if not given.is_causal or given.q.shape[2] != given.k.shape[2]:
        raise NotExpressible("fla's operators are causal, with as many queries as keys")
    taken = inspect.signature(function).parameters
    named = {}
    for name, x in given.inputs.items():
        known = [one for one in FLA_NAMES.get(name, ()) if one in taken]
        if not known:
            raise NotExpressible(f"this operator has no argument for {name}")
        named[known[0]] = x if head_first else x.transpose(1, 2)
    q, k, v = given.q, given.k, given.v
    if q.shape[1] != k.shape[1]:
        raise NotExpressible("fla's operators have as many key heads as query heads")
    for names, x in zip((("q", "query"), ("k", "key"), ("v", "value")), (q, k, v), strict=True):
        name = names[1] if names[1] in taken else names[0]
        named[name] = x if head_first else x.transpose(1, 2)
    return function(**named, **told)


def _refuse_inputs(given: Asked, name: str) -> None:
    if given.inputs:
        raise NotExpressible(f"{name} has no argument for {', '.join(given.inputs)}")


def _refuse_masks(given: Asked, name: str) -> None:
    if given.key_mask is not None or given.segments is not None:
        raise NotExpressible(f"{name} has no mask of keys")


def _dialect(call: Callable[[Callable[..., Any], Any], Tensor], **differs: Any) -> Dialect:
    return Dialect(call.__name__, " ".join((call.__doc__ or "").split()), call, **differs)


#: By name.
DIALECTS = {
    one.name: one
    for one in (
        _dialect(attnzoo, isolates_nan=True),
        _dialect(sdpa),
        _dialect(transformers, hidden_row="mean of v", roundings=3),
        _dialect(transformers_layer, sizes=layer_sizes, hidden_row="mean of v", roundings=3),
        _dialect(fla, final_state=_fla_state(head_first=False)),
        _dialect(fla_head_first, final_state=_fla_state(head_first=True)),
        _dialect(flash_attn),
    )
}


def find_dialect(name: str) -> Dialect:
    """The dialect of this name. Raises ValueError with the nearest where there is none."""
    return DIALECTS[check_choice("dialect", name, list(DIALECTS))]
