"""A as a swapped model returns it, where it is asked for output_attentions."""

from __future__ import annotations

from typing import Any, NoReturn

from attnzoo.call import UnsupportedError


def wants_weights(kwargs: dict[str, Any]) -> bool:
    """Whether a model is asked for A of its layers: some families tell their layers, others gather
    what these return.

    kwargs: of the attention function
    """
    if kwargs.get("output_attentions"):
        return True
    from transformers.utils import output_capturing

    gathered: Any = output_capturing._active_collector.get()
    return any("attentions" in key for key in gathered or ())


def no_weights_of_a_state() -> NoReturn:
    """Raise UnsupportedError: a decoding state keeps no keys to form A of."""
    raise UnsupportedError(
        "output_attentions=True beside attnzoo.state_cache: a decoding state keeps no keys, of "
        "which A could be formed; give the whole text without past_key_values"
    )
