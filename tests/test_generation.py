"""Generation of swapped transformers models: the same tokens without a cache, with transformers'
own, and with a state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from small import in_models, of_each_family, of_each_folder, small
from stages import in_turn, only, staged
from swap_models import DECODERS, answer, make, padded, tokens
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

import attnzoo
from attnzoo import UnsupportedError
from attnzoo.registry import spec_of

VARIANTS = [name for name in in_models() if spec_of(name).decodes]
PROMPT, NEW = 12, 8
GREEDY: dict[str, Any] = {
    "attention_mask": padded("left", PROMPT),
    "max_new_tokens": NEW,
    "do_sample": False,
    "pad_token_id": 0,
}
#: float32 rounding of logits of order 10 through three layers.
ROUNDING: Any = {"rtol": 0.0, "atol": 1e-4}
KINDS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True},
    "sampled beams": {"num_beams": 2, "do_sample": True},
}


def sharp(family: str, **options: Any) -> Any:
    """A model whose attention is far from uniform, so that every key matters for the tokens."""
    return make(family, initializer_range=0.4, **options)


def swapped(family: str, name: str) -> Any:
    return attnzoo.swap(sharp(family), name, **small(name))


def generate(model: Any, **settings: Any) -> Tensor:
    torch.manual_seed(5)
    return model.generate(tokens(PROMPT), **{**GREEDY, **settings})


#: Every variant in one family and every family with some variants, each variant in two.
FAMILIES = [("llama", name) for name in VARIANTS] + [
    (family, name)
    for place, family in enumerate(family for family in DECODERS if family != "llama")
    for name in VARIANTS[place::4]
]


#: Every family with one variant, and one of each family of variants.
FEW = [
    (family, name) for family, name in FAMILIES if family == "llama" and name in of_each_family()
]
FEW += [next(pair for pair in FAMILIES if pair[0] == family) for family in dict(FAMILIES)]


@pytest.mark.parametrize(("family", "name"), only(FEW, FAMILIES))
def test_the_same_tokens_with_every_cache(family: str, name: str) -> None:
    model = swapped(family, name)
    without = generate(model, use_cache=False)
    assert (
        without.shape == (2, PROMPT + NEW) and len(set(without[:, PROMPT:].flatten().tolist())) > 2
    )
    if not spec_of(name).has_gates:  # test_swap_gates says why
        assert torch.equal(generate(model), without)
        assert torch.equal(generate(model, cache_implementation="static"), without)
    cache = attnzoo.state_cache(model)
    assert torch.equal(generate(model, past_key_values=cache), without)
    assert cache.get_seq_length() == PROMPT + NEW - 1


@pytest.mark.parametrize(
    ("family", "name", "kind"),
    [staged("llama", name, "sampled beams", first=name in of_each_folder()) for name in VARIANTS]
    + [
        staged("gpt2", name, ("beams", "sampling")[i % 2], first=name in of_each_folder())
        for i, name in enumerate(VARIANTS)
    ],
)
def test_beams_and_sampling(family: str, name: str, kind: str) -> None:
    model, settings = swapped(family, name), KINDS[kind]
    without = generate(model, use_cache=False, **settings)
    if not spec_of(name).has_gates:
        assert torch.equal(generate(model, **settings), without)
    assert torch.equal(
        generate(model, past_key_values=attnzoo.state_cache(model), **settings), without
    )


@pytest.mark.parametrize("name", only(of_each_family(), VARIANTS))
def test_a_prompt_in_chunks(name: str) -> None:
    model = swapped("llama", name)
    expected = generate(model, use_cache=False)
    for chunk in (1, 5, 12):
        cache = attnzoo.state_cache(model)
        found = generate(model, past_key_values=cache, prefill_chunk_size=chunk)
        assert torch.equal(found, expected), f"{chunk} tokens at a time"


@pytest.mark.parametrize(("family", "name", "side"), in_turn(FAMILIES, ["left", "none"]))
def test_logits_in_pieces_are_those_of_one_forward(family: str, name: str, side: str) -> None:
    model, ids, mask = swapped(family, name), tokens(), padded(side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = answer(model, ids, attention_mask=mask, position_ids=positions, use_cache=False)
    cache, seen = attnzoo.state_cache(model), 0
    with torch.no_grad():
        for length in (3, 9, 1, 1, 10):
            part = slice(seen, seen + length)
            seen += length
            rows = answer(
                model,
                ids[:, part],
                attention_mask=mask[:, :seen],
                position_ids=positions[:, part],
                past_key_values=cache,
            )
            real = mask[:, part].bool()
            torch.testing.assert_close(rows[real], expected[:, part][real], **ROUNDING)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_held_is_bounded_where_the_state_is(name: str) -> None:
    """Elements are the closed form's, layer by layer, and bytes stop growing exactly where it says
    so."""
    model = attnzoo.swap(make("llama"), name, **small(name, 1024))
    attention = model.model.layers[0].self_attn.attention_core
    kv_heads = attention.heads if attention.spec.has_gates else 2
    held, grows = [], attention.cost(1, 1024, kv_heads=kv_heads, is_causal=True).state_growth > 0
    assert grows == {"exact": True, "kernel": False}.get(attention.spec.family, grows)
    cache = attnzoo.state_cache(model)
    with torch.no_grad():
        for length in (300, 1, 700, 1, 1):
            model(tokens(length, 1), past_key_values=cache)
            if length == 1:
                held.append(cache.held_bytes())
                cost = attention.cost(1, cache.get_seq_length(), kv_heads=kv_heads, is_causal=True)
                assert {layer.state.elements() for layer in cache.layers} == {cost.state_elements}
                assert held[-1] >= 3 * cost.state_bytes
    assert (held[0] < held[1]) == grows and (held[1] == held[2])
    if not grows:
        assert held[0] == held[1] < 30_000  # 1,000 keys and values would take 384,000


@pytest.mark.parametrize(
    "mix",
    [
        {0: "linear", 2: "standard"},
        {1: ("sliding_window", {"window": 4})},
        {
            0: "bigbird",
            1: ("performer", {"num_features": 16}),
            2: ("sliding_window", {"window": 5}),
        },
    ],
    ids=["first and last", "middle", "all"],
)
@pytest.mark.parametrize("kind", ["greedy", "beams"])
def test_a_mixed_model(mix: dict[int, Any], kind: str) -> None:
    """A layer that was not swapped keeps transformers' keys and values, and the mask over all of
    them."""
    model = attnzoo.swap(sharp("llama"), mix)
    expected = generate(model, use_cache=False, **KINDS[kind])
    cache = attnzoo.state_cache(model)
    assert torch.equal(generate(model, past_key_values=cache, **KINDS[kind]), expected)
    assert [type(layer).__name__ == "StateLayer" for layer in cache.layers] == [
        layer in mix for layer in range(3)
    ]
    own = next((layer for layer in cache.layers if type(layer).__name__ != "StateLayer"), None)
    assert own is None or own.get_seq_length() == PROMPT + NEW - 1


@pytest.mark.parametrize("layers", [0, 1, "0-2"])
def test_a_model_with_a_window_of_its_own(layers: Any) -> None:
    """Layers left alone keep transformers' cropped cache beside the states."""
    exact = generate(sharp("mistral", sliding_window=6))
    model = attnzoo.swap(
        sharp("mistral", sliding_window=6), "sliding_window", window=6, layers=layers
    )
    assert torch.equal(generate(model, past_key_values=attnzoo.state_cache(model)), exact)


def test_layers_of_two_kinds() -> None:
    """Qwen2 with full attention below and its own window above: each kind of layer gets the mask of
    its kind."""
    options: dict[str, Any] = {
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    }
    exact = generate(sharp("qwen2", **options))
    for mix in (
        {0: "standard"},
        {1: ("sliding_window", {"window": 6})},
        {0: "standard", 2: ("sliding_window", {"window": 6})},
    ):
        model = attnzoo.swap(sharp("qwen2", **options), mix)
        assert torch.equal(generate(model, past_key_values=attnzoo.state_cache(model)), exact)


@pytest.mark.parametrize("name", only(of_each_family(), VARIANTS))
def test_one_prompt_gone_on_from_twice(name: str) -> None:
    model, ids = swapped("llama", name), tokens(20)
    root = attnzoo.state_cache(model)
    with torch.no_grad():
        model(ids[:, :10], past_key_values=root)
        for tail in (ids[:, 10:], ids[:, 10:].flip(1)):
            branch = copy.deepcopy(root)
            assert branch.layers[0].attention is root.layers[0].attention
            rows = torch.cat(
                [answer(model, token, past_key_values=branch) for token in tail.split(1, 1)], 1
            )
            whole = answer(model, torch.cat([ids[:, :10], tail], 1), use_cache=False)
            torch.testing.assert_close(rows, whole[:, 10:], **ROUNDING)
    assert root.get_seq_length() == 10


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_of_the_batch_are_selected_and_repeated(name: str) -> None:
    model, ids = swapped("llama", name), tokens(16, 3)
    rows = torch.tensor([2, 2, 0, 1])
    changes = {
        "reorder": rows,
        "repeat": torch.tensor([0, 0, 1, 1, 2, 2]),
        "select": torch.tensor([1]),
    }
    whole = answer(model, ids, use_cache=False)
    for change, expected in changes.items():
        cache: Any = attnzoo.state_cache(model)
        with torch.no_grad():
            model(ids[:, :9], past_key_values=cache)
            if change == "reorder":
                cache.reorder_cache(rows)
            elif change == "repeat":
                cache.batch_repeat_interleave(2)
            else:
                cache.batch_select_indices(torch.tensor([False, True, False]))
            out = answer(model, ids[expected, 9:], past_key_values=cache)
        torch.testing.assert_close(out, whole[expected, 9:], **ROUNDING)


def test_reset_forgets() -> None:
    model = swapped("llama", "linear")
    expected, cache = generate(model, use_cache=False), attnzoo.state_cache(model)
    model(tokens(7, 5), past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.held_bytes() == 0
    assert torch.equal(generate(model, past_key_values=cache), expected)


@pytest.mark.parametrize("name", ["linear", "sliding_window"])
def test_the_decoder_of_an_encoder_decoder(name: str) -> None:
    model = make("bart")
    attnzoo.swap(model.get_decoder(), name, **small(name))
    wanted = model.generate(tokens(), max_new_tokens=8, do_sample=False, use_cache=False)
    state = attnzoo.state_cache(model.get_decoder())
    cache = EncoderDecoderCache(state, DynamicCache())
    assert torch.equal(
        model.generate(tokens(), max_new_tokens=8, do_sample=False, past_key_values=cache), wanted
    )
    assert state.get_seq_length() == 8 and all(
        type(layer).__name__ == "StateLayer" for layer in state.layers
    )


def test_models_that_have_no_state_to_keep() -> None:
    with pytest.raises(ValueError, match="is not swapped"):
        attnzoo.state_cache(make("llama"))
    with pytest.raises(
        UnsupportedError,
        match=r"layer 0 \(encoder.layer.0.attention.self\) of BertModel does not read "
        r"from left to right",
    ):
        attnzoo.state_cache(attnzoo.swap(make("bert"), "linear"))
    with pytest.raises(
        UnsupportedError,
        match=r"of BartForConditionalGeneration does not .* swap the decoder alone",
    ):
        attnzoo.state_cache(attnzoo.swap(make("bart"), "linear"))
    with pytest.raises(ValueError, match="TransformerEncoderLayer is no transformers model"):
        attnzoo.state_cache(
            attnzoo.swap(
                torch.nn.TransformerEncoderLayer(32, 4, dropout=0.0, batch_first=True), "linear"
            )
        )


def test_a_cache_belongs_to_one_swap() -> None:
    model = swapped("llama", "linear")
    cache = attnzoo.state_cache(model)
    model(tokens(), past_key_values=cache)
    other = swapped("llama", "linear")
    with pytest.raises(UnsupportedError, match="attends to another layer's keys"):
        other(tokens(), past_key_values=attnzoo.state_cache(model))
    attnzoo.unswap(model)
    with pytest.raises(
        ValueError, match="swapped again, or back, since this cache was made; make a new cache"
    ):
        model(tokens(1), past_key_values=cache)
    attnzoo.swap(model, "performer")
    with pytest.raises(ValueError, match="swapped again"):
        model(tokens(1), past_key_values=cache)


def test_a_mask_or_a_batch_that_the_state_cannot_take() -> None:
    model = swapped("llama", "standard")
    cache = attnzoo.state_cache(model)
    with pytest.raises(UnsupportedError, match="4-D attention_mask"):
        model(
            tokens(),
            attention_mask=torch.ones(2, 1, 24, 24, dtype=torch.bool),
            past_key_values=cache,
        )
    with pytest.raises(ValueError, match=r"stopped before its end.*make a new cache"):
        model(tokens(), past_key_values=cache)
    cache.reset()
    model(tokens(), past_key_values=cache)
    with pytest.raises(ValueError, match="state was made for batch_size=2"):
        model(tokens(1, 3), past_key_values=cache)


def test_a_state_is_refused_where_every_token_comes_again() -> None:
    """With use_cache=False `generate` passes the whole text at every step; MPT's config says so.
    Inside an encoder-decoder's cache too."""
    model = make("bart")
    attnzoo.swap(model.get_decoder(), "standard")
    cache = EncoderDecoderCache(attnzoo.state_cache(model.get_decoder()), DynamicCache())
    with pytest.raises(ValueError, match=r"use_cache=False.* give use_cache=True beside it"):
        model.generate(tokens(), max_new_tokens=3, past_key_values=cache, use_cache=False)
    model = swapped("llama", "standard")
    with pytest.raises(ValueError, match=r"use_cache=False.* give use_cache=True beside it"):
        generate(model, past_key_values=attnzoo.state_cache(model), use_cache=False)
