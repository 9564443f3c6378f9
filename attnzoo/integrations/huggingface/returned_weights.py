"""A as a swapped model returns it, where it is asked for output_attentions."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from attnzoo.attention import Attention
from attnzoo.call import UnsupportedError
from attnzoo.eager import is_recorded


def wants_weights(kwargs: dict[str, Any]) -> bool:
    """Whether a model is asked for A of its layers: some families tell their layers, others gather
    what these return.

    kwargs: of the attention function
    """
    if kwargs.get("output_attentions"):
        return True
    from transformers.utils import output_capturing

    collector: Any = output_capturing._active_collector
    if is_recorded():  # a compiler cannot ask a context variable, and transformers sets another
        gathered = collector.global_var if collector.compiling else None
    else:
        gathered = collector.get()
    return any("attentions" in key for key in gathered or ())


def has_own_values(attention: Attention | None) -> bool:
    """Whether some rows of an attention read other values than the model gives it."""
    return attention is not None and any(one.like == "v" for one in attention.spec.inputs)


def through_weights(weights: Tensor, value: Tensor) -> Tensor:
    """The rows as A·v, so that gradients come to the A that is returned.

    weights: (batch, heads, query_length, key_length)
    value: (batch, kv_heads, key_length, value_dim)
    """
    return weights @ value.repeat_interleave(weights.shape[1] // value.shape[1], 1)


def no_weights_of_a_state() -> NoReturn:
    """Raise UnsupportedError: a decoding state keeps no keys to form A of."""
    raise UnsupportedError(
        "output_attentions=True beside attnzoo.state_cache: a decoding state keeps no keys, of "
        "which A could be formed; give the whole text without past_key_values"
    )
