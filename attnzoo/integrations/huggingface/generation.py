"""`state_cache`: generation that keeps the bounded state of an attention instead of all keys and
values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnzoo.call import UnsupportedError
from attnzoo.integrations.huggingface.attention_function import call_is_causal
from attnzoo.integrations.swapping import swapped_part

if TYPE_CHECKING:
    from attnzoo.integrations.huggingface.state_cache import StateCache


def state_cache(model: Any) -> StateCache:
    """An empty cache for a swapped Hugging Face model: `model.generate(ids,
    past_key_values=attnzoo.state_cache(model))`.

    It is a `transformers.Cache` that carries, for every swapped layer, the state of
    `Attention.step`: linear and performer keep two sums, sliding_window its last keys and values,
    so that memory and time per token stop growing with the length (`Cost.state_growth` is 0); the
    others keep every key and value in a buffer that grows. Layers that were not swapped keep
    transformers' own. Tokens are those of generation with transformers' cache, or without one.
    `held_bytes()` is what it takes now. From transformers 5.24 on the argument is called `cache`.

    Prefill at once or in chunks (`prefill_chunk_size`), left padding, beam search, sampling,
    assisted generation (`assistant_model`, `prompt_lookup_num_tokens`), `reset()` and
    `copy.deepcopy` (cheap: a prompt read once, gone on from many times) work. `crop(-n)` takes the
    last n tokens back, those of the last forward, at most 128 where a state is bounded.

    Of an encoder-decoder swap the decoder alone, and generate with
    `past_key_values=transformers.EncoderDecoderCache(attnzoo.state_cache(model.get_decoder()),
    transformers.DynamicCache())`.

    Raises ValueError when the model is not swapped or is no transformers model, UnsupportedError
    when it cannot decode.
    """
    part, record = swapped_part(model)
    if record.integration != "huggingface":
        raise ValueError(
            f"{type(part).__name__} is no transformers model; decode with Attention.init_state and "
            "Attention.step"
        )
    swapped = []
    for layer, attention in record.cores.items():
        path = record.sites[layer][0]
        swapped.append((record.modules[layer], attention))
        if not call_is_causal(swapped[-1][0], None) or not attention.spec.decodes:
            raise UnsupportedError(
                f"layer {layer} ({path}) of {type(part).__name__} does not read from left to "
                "right, so no state can stand for its past (of an "
                "encoder-decoder swap the decoder alone: model.get_decoder())"
            )
    from attnzoo.integrations.huggingface.state_cache import StateCache

    return StateCache(part.config, swapped)
