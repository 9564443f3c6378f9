"""Generation of swapped transformers models that takes tokens back: the tokens of plain greedy
decoding, from bounded states."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from small import of_each_family, small
from stages import staged
from swap_models import answer, make, padded, tokens
from test_generation import PROMPT, ROUNDING, VARIANTS, sharp, swapped
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

import attnzoo

SETTINGS: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}


class Watched:
    """How many tokens each `crop` of a cache removes."""

    def __init__(self, cache: Any) -> None:
        self.removed: list[int] = []
        crop = cache.crop

        def watch(tokens_to_remove: int) -> None:
            self.removed.append(-tokens_to_remove)
            crop(tokens_to_remove)

        cache.crop = watch


def generate(model: Any, side: str = "none", **settings: Any) -> Tensor:
    mask = padded(side, PROMPT)[:1]
    return model.generate(tokens(PROMPT, 1), attention_mask=mask, **SETTINGS, **settings)


@pytest.mark.parametrize(
    ("family", "side", "name"),
    [
        staged(family, side, name, first=name in of_each_family() and place % 2 == number)
        for number, (family, side) in enumerate([("gpt2", "none"), ("llama", "left")])
        for place, name in enumerate(VARIANTS)
    ],
)
def test_the_tokens_of_greedy_decoding(family: str, name: str, side: str) -> None:
    model = swapped(family, name)
    expected = generate(model, side, use_cache=False)
    removed = []
    helpers: Any = ({"assistant_model": sharp(family)}, {"prompt_lookup_num_tokens": 4})
    for helper in helpers:
        cache = attnzoo.state_cache(model)
        watched = Watched(cache)
        assert torch.equal(generate(model, side, past_key_values=cache, **helper), expected)
        assert cache.get_seq_length() == PROMPT + 13
        removed += watched.removed
    assert cache.is_croppable and (name in ("standard", "flash") or max(removed) > 0)


@pytest.mark.parametrize("layers", [0, 1, "0-2"])
def test_beside_layers_with_a_window_of_their_own(layers: Any) -> None:
    """Layers left alone record their past as transformers has it, and are cropped with the
    states."""
    expected = generate(sharp("mistral", sliding_window=6))
    model = sharp("mistral", sliding_window=6)
    attnzoo.swap(model, "sliding_window", window=6, layers=layers)
    helpers: Any = ({"assistant_model": sharp("llama")}, {"prompt_lookup_num_tokens": 4})
    for helper in helpers:
        cache = attnzoo.state_cache(model)
        assert torch.equal(generate(model, past_key_values=cache, **helper), expected)


def test_the_model_that_helps_may_be_swapped_or_a_part_of_the_same() -> None:
    model = swapped("llama", "sliding_window")
    expected = generate(model, use_cache=False)
    helpers: Any = ({"assistant_model": swapped("llama", "linear")}, {"assistant_early_exit": 2})
    for helper in helpers:
        cache = attnzoo.state_cache(model)
        assert torch.equal(generate(model, past_key_values=cache, **helper), expected)


@pytest.mark.parametrize("name", ["linear", "sliding_window"])
def test_the_decoder_of_an_encoder_decoder(name: str) -> None:
    model = make("bart", initializer_range=0.4)
    attnzoo.swap(model.get_decoder(), name, **small(name))
    expected = generate(model, use_cache=False)
    cache = EncoderDecoderCache(attnzoo.state_cache(model.get_decoder()), DynamicCache())
    found = generate(model, past_key_values=cache, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_candidates_side_by_side(name: str) -> None:
    """What contrastive search does with a cache: read candidates for every sample, take them back
    or keep one of them."""
    model, ids = swapped("llama", name), tokens(16)
    whole = answer(model, ids, use_cache=False)
    cache = attnzoo.state_cache(model)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        cache.batch_repeat_interleave(3)
        others = tokens(12, 6)[:, :4]
        others[[1, 5]] = ids[:, 9:13]
        model(others, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1, 5]))
        cache.crop(-2)
        assert cache.get_seq_length() == 11
        out = answer(model, ids[:, 11:], past_key_values=cache)
    torch.testing.assert_close(out, whole[:, 11:], **ROUNDING)


def test_what_cannot_be_taken_back() -> None:
    """Then no layer has lost a token."""
    model = attnzoo.swap(sharp("llama"), {0: "standard", 1: "linear"})
    cache = attnzoo.state_cache(model)
    cache.crop(0)
    cache.crop(-2)  # of layers that have read nothing, as transformers' own
    model(tokens(9), past_key_values=cache)
    model(tokens(3), past_key_values=cache)
    with pytest.raises(ValueError, match="n=4 must be a whole number from 0 to 3"):
        cache.crop(-4)
    with pytest.raises(ValueError, match=r"crop\(2\) is not supported; .* negative number"):
        cache.crop(2)
    assert [layer.get_seq_length() for layer in cache.layers] == [12] * 3
    cache.crop(-3)
    assert [layer.get_seq_length() for layer in cache.layers] == [9] * 3
    with pytest.raises(ValueError, match="only supported for batch_size = 1"):  # transformers' own
        model.generate(
            tokens(), prompt_lookup_num_tokens=2, past_key_values=attnzoo.state_cache(model)
        )
