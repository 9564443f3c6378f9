"""attnzoo.swap tries a model out: what it makes up, what a caller gives, and what the model tells
of its sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import transformers as hf
from small import SMALL, in_models, of_each_family, small
from stages import only
from swap_models import SIZES, answer, answer_of, inputs_of, make, tokens
from torch import nn

import attnzoo
from attnzoo import UnsupportedError

ROUNDING: Any = {"rtol": 0.0, "atol": 5e-6}
SIZED = [name for name in attnzoo.names() if attnzoo.describe(name).spec.needs_max_length]

#: Of every family that reads no plain text: the attentions of the whole, and its parts with theirs.
UNUSUAL: dict[str, tuple[int, dict[str, int]]] = {
    "whisper": (4, {"model.encoder": 2, "model.decoder": 2}),
    "speech_to_text": (4, {"model.encoder": 2, "model.decoder": 2}),
    "ast": (3, {}),
    "videomae": (3, {}),
    "patchtst": (2, {"model": 2}),
    "musicgen": (4, {"text_encoder": 2, "decoder": 2, "decoder.model.decoder": 2}),
    "qwen2_moe": (3, {"model": 3}),
}


def cores(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, attnzoo.Attention)]


@pytest.mark.parametrize("family", UNUSUAL)
def test_what_reads_no_plain_text(family: str) -> None:
    """The whole, and its parts alone and one after the other, are what they were."""
    sites, parts = UNUSUAL[family]
    model = make(family)
    exact, before = answer_of(family, model), model.config._attn_implementation
    attnzoo.swap(model, "standard")
    torch.testing.assert_close(answer_of(family, model), exact, **ROUNDING)
    assert len(cores(model)) == sites and all(core.last_backend for core in cores(model))
    attnzoo.unswap(model)
    for path, count in parts.items():
        part = attnzoo.swap(model.get_submodule(path), "standard")
        torch.testing.assert_close(answer_of(family, model), exact, **ROUNDING)
        assert len(cores(model)) == count and all(core.last_backend for core in cores(model))
        attnzoo.unswap(part)
    assert (
        torch.equal(answer_of(family, model), exact) and model.config._attn_implementation == before
    )


@pytest.mark.parametrize("first", ["encoder", "decoder"])
@pytest.mark.parametrize("family", ["bart", "whisper", "speech_to_text"])
def test_halves_that_share_a_config(family: str, first: str) -> None:
    """Either half first, and either back first: the config is its own again when both are."""
    model = make(family)
    exact = answer_of(family, model)
    halves = {half: model.get_submodule(f"model.{half}") for half in ("encoder", "decoder")}
    names = {"encoder": "linear", "decoder": "sliding_window"}
    order = sorted(halves, key=lambda half: half != first)
    for half in order:
        attnzoo.swap(halves[half], names[half], **SMALL.get(names[half], {}))
    assert sorted(core.spec.name for core in cores(model)) == [
        "linear",
        "linear",
        "sliding_window",
        "sliding_window",
    ]
    both = answer_of(family, model)
    assert all(core.last_backend for core in cores(model))
    wanted = make(family)
    attnzoo.swap(wanted, {"0-1": "linear", "2-3": ("sliding_window", SMALL["sliding_window"])})
    torch.testing.assert_close(both, answer_of(family, wanted), **ROUNDING)
    attnzoo.unswap(halves[first])
    assert len(cores(model)) == 2 and model.config._attn_implementation == "attnzoo"
    answer_of(family, model)
    attnzoo.swap(halves[first], "standard")
    attnzoo.unswap(halves[order[1]])
    torch.testing.assert_close(answer_of(family, model), exact, **ROUNDING)
    attnzoo.unswap(halves[first])
    assert (
        torch.equal(answer_of(family, model), exact)
        and model.config._attn_implementation == "eager"
    )
    assert not hasattr(model.config, "attnzoo_swaps")


def test_inputs_that_attnzoo_cannot_make_up_are_given() -> None:
    model = make("time_series")
    exact, inputs = answer_of("time_series", model), inputs_of("time_series")
    sentence = (
        r"reads past_values, which attnzoo cannot make up to try the swap; give "
        r"some: .*example_inputs=\{\.\.\.\}"
    )
    with pytest.raises(UnsupportedError, match=sentence):
        attnzoo.swap(model, "standard")
    attnzoo.swap(model, "standard", example_inputs=inputs)
    assert len(cores(model)) == 4
    torch.testing.assert_close(answer_of("time_series", model), exact, **ROUNDING)
    attnzoo.unswap(model)
    assert torch.equal(answer_of("time_series", model), exact)


def test_inputs_that_reach_every_part() -> None:
    """LLaVA's vision tower is read where there are pixels, and their place among the tokens."""
    model, ids = make("llava"), torch.cat([torch.full((1, 16), 49), tokens(6, 1)], 1)
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
    }
    exact = model(**inputs).logits
    with pytest.raises(UnsupportedError, match=r"or give inputs that reach it: .*example_inputs="):
        attnzoo.swap(model, "standard")
    attnzoo.swap(model, "standard", example_inputs=inputs)
    assert len(cores(model)) == 6
    torch.testing.assert_close(model(**inputs).logits, exact, **ROUNDING)


def test_malformed_example_inputs() -> None:
    llama, bart = make("llama"), make("bart")
    for malformed in (tokens(), {}, {1: tokens()}):
        with pytest.raises(
            ValueError, match=r"(?s)example_inputs=.* must be a mapping of the model's arguments"
        ):
            attnzoo.swap(llama, "linear", example_inputs=malformed)  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        UnsupportedError, match=r"could not be tried out with the example_inputs \(.*input_ids"
    ):
        attnzoo.swap(llama, "linear", example_inputs={"pixels": tokens()})
    with pytest.raises(UnsupportedError, match="encoder and decoder sequences of one length, 24"):
        attnzoo.swap(
            bart, "linear", example_inputs={"input_ids": tokens(), "decoder_input_ids": tokens()}
        )
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True), 1)
    with pytest.raises(ValueError, match="example_inputs are for transformers models"):
        attnzoo.swap(encoder, "linear", example_inputs={"src": torch.ones(1, 2, 32)})
    assert not cores(llama) and not cores(bart) and not cores(encoder)
    assert llama.config._attn_implementation == bart.config._attn_implementation == "eager"


#: Families that are told apart by how their longest sequence is known, and that length.
LONGEST = {
    "bert": 512,
    "roberta": 514 - 2,
    "gpt2": 1024,
    "llama": 2048,
    "vit": 17,
    "ast": 8,
    "videomae": 8,
    "patchtst": 4,
}


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("family", LONGEST)
def test_the_longest_sequence_is_the_models_own(family: str, name: str) -> None:
    model, spec = make(family), attnzoo.describe(name).spec
    if family in ("gpt2", "llama") and not spec.causal:
        # Before it asks for a length.
        with pytest.raises(UnsupportedError, match=f"layer 0 .*{name} cannot be causal"):
            attnzoo.swap(model, name)
        return
    attnzoo.swap(model, name)
    assert {core.max_length for core in cores(model)} == {
        getattr(model.config, "max_position_embeddings", LONGEST[family])
    }
    answer_of(family, model)
    attnzoo.swap(attnzoo.unswap(model), name, max_length=40)
    assert {core.max_length for core in cores(model)} == {40}


@pytest.mark.parametrize("name", SIZED)
def test_a_model_that_does_not_tell_how_long_its_sequences_get(name: str) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True), 1)
    sentence = (
        rf"{name} needs max_length, and this model does not tell how long its "
        rf"sequences get: attnzoo\.swap\(model, '{name}', max_length"
    )
    for model in (make("wav2vec2"), encoder):
        with pytest.raises(ValueError, match=sentence):
            attnzoo.swap(model, name)
        assert not cores(model)


def test_lengths_of_both_halves_of_whisper() -> None:
    model = attnzoo.swap(make("whisper"), "cosformer")
    assert [core.max_length for core in cores(model)] == [16, 16, 24, 24]


@pytest.mark.parametrize("name", only(of_each_family(), in_models()))
def test_models_that_are_made_from_one_config(name: str) -> None:
    """In a loop, with the one before gone or not: each is swapped, and the config is its own again
    behind them."""
    spec = attnzoo.describe(name).spec
    made = make("llama" if spec.causal else "bert")
    config, kind = made.config, type(made)
    for keep in (False, True):
        kept = []
        for _ in range(3):
            model = kind(config).eval()
            exact = answer(model, tokens())
            attnzoo.swap(model, name, **small(name))
            assert len(cores(model)) == 3 and (
                spec.exact or not torch.equal(answer(model, tokens()), exact)
            )
            kept += [model] if keep else []
            del model
        assert (
            (config._attn_implementation == "attnzoo")
            == keep
            == bool(getattr(config, "attnzoo_swaps", []))
        )
        for model in kept:
            assert config._attn_implementation == "attnzoo"
            attnzoo.unswap(model)
        assert config._attn_implementation == "eager" and not hasattr(config, "attnzoo_swaps")
        del kept


def test_a_window_in_a_mask_that_no_layer_is_given() -> None:
    """Qwen2-MoE makes a mask of a window of 0 where it has none; where it has one, its layers do
    not tell of it."""
    assert make("qwen2_moe").config.sliding_window == 0
    model = make("qwen2_moe", use_sliding_window=True, sliding_window=6, max_window_layers=3)
    for name in attnzoo.names():
        with pytest.raises(
            UnsupportedError,
            match="masks by a window of 6 that its attention layers do not tell of",
        ):
            attnzoo.swap(model, name, **small(name))
    assert not cores(model)


@pytest.mark.parametrize(
    "name", [name for name in attnzoo.names() if attnzoo.describe(name).spec.bidirectional]
)
def test_a_bert_that_is_made_from_a_config(name: str) -> None:
    """It is in training mode and drops entries of A: a variant that forms none says what to do, and
    both ways out work."""

    def bert(**options: Any) -> Any:
        return hf.BertForSequenceClassification(hf.BertConfig(**{**SIZES, **options}))

    if attnzoo.describe(name).spec.dropout:
        attnzoo.swap(bert(), name, **small(name))
        return
    model = bert()
    sentence = (
        "attention_probs_dropout_prob=0.0.*; to evaluate it only, call model.eval\\(\\) before the "
        "swap"
    )
    with pytest.raises(UnsupportedError, match=sentence):
        attnzoo.swap(model, name, **small(name))
    with pytest.warns(UserWarning, match=sentence):
        attnzoo.swap(model.eval(), name, **small(name))
    attnzoo.swap(bert(attention_probs_dropout_prob=0.0), name, **small(name))


def test_a_model_of_multiple_choice_reads_tokens_of_its_choices() -> None:
    kind: Any = type("Mine", (hf.BertForMultipleChoice,), {})
    model = kind(hf.BertConfig(**SIZES)).eval()
    ids = tokens(6, 6).view(2, 3, 6)
    exact = model(ids).logits
    attnzoo.swap(model, "standard")
    torch.testing.assert_close(model(ids).logits, exact, **ROUNDING)


@pytest.mark.parametrize("family", ["bart", "bert", "llama"])
def test_a_model_without_numbers_is_swapped_in_part(family: str) -> None:
    """On the meta device, where the layers that stay exact cannot look at a mask either."""
    with torch.device("meta"):
        model = make(family, num_hidden_layers=2)
        attnzoo.swap(model, "standard", layers=[0])
    assert len(cores(model)) == 1 and all(value.is_meta for value in model.parameters())
