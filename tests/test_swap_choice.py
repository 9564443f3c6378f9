"""The attention of a swapped transformers model set on the fly: past the swap and back, on purpose
and not."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from swap_models import answer_of, make, tokens

import attnzoo
from attnzoo.fidelity.pretrained import capture_tensors

ROUNDING: Any = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "bart", "clip"])
def test_a_chosen_implementation_runs_without_the_swap_until_attnzoo_is_chosen(family: str) -> None:
    model = make(family)
    exact = answer_of(family, model)
    swapped = answer_of(family, attnzoo.swap(model, "linear"))
    assert not torch.equal(swapped, exact)
    for chosen in ("sdpa", "eager"):
        model.set_attn_implementation(chosen)
        assert model.config._attn_implementation == chosen
        torch.testing.assert_close(answer_of(family, model), exact, **ROUNDING)
    with pytest.raises(ValueError, match="foo"):
        model.set_attn_implementation("foo")
    torch.testing.assert_close(answer_of(family, model), exact, **ROUNDING)
    model.set_attn_implementation("attnzoo")
    assert torch.equal(answer_of(family, model), swapped)
    model.set_attn_implementation("sdpa")
    assert torch.equal(answer_of(family, attnzoo.unswap(model)), exact)


def test_weights_come_out_where_eager_attention_was_chosen() -> None:
    model = attnzoo.swap(make("llama"), "linear")
    model.set_attn_implementation("eager")
    assert len(model(tokens(), output_attentions=True).attentions) == 3


def test_a_swapped_config_asks_for_weights(tmp_path: Path) -> None:
    """As transformers' own test_attention_outputs does: in the config, and in a model made of
    it."""
    model = attnzoo.swap(make("llama"), "sliding_window", window=2)
    asked = model(tokens(), output_attentions=True).attentions
    model.config.output_attentions = True
    for mine, theirs in zip(model(tokens()).attentions, asked, strict=True):
        assert torch.equal(mine, theirs)
    other = attnzoo.swap(type(model)(model.config), "linear")
    assert len(other(tokens()).attentions) == 3
    model.save_pretrained(tmp_path)
    assert type(model.config).from_pretrained(tmp_path).output_attentions
    plain = make("llama")
    plain.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="set it to 'eager'"):
        plain.config.output_attentions = True
    plain.config._output_attentions = True
    with pytest.raises(Exception, match="set it to 'eager'"):  # of huggingface_hub's own kind
        plain.config.validate()


def test_a_part_is_chosen_for_alone() -> None:
    """One that shares the whole's config, and one that has its own."""
    model = make("llama")
    exact = answer_of("llama", model)
    attnzoo.swap(model, "linear")
    model.model.set_attn_implementation("sdpa")
    torch.testing.assert_close(answer_of("llama", model), exact, **ROUNDING)
    both = make("clip")
    exact = answer_of("clip", both)
    swapped = answer_of("clip", attnzoo.swap(both, "linear", layers="0-2"))  # those that see
    both.text_model.set_attn_implementation("sdpa")
    torch.testing.assert_close(answer_of("clip", both), swapped, **ROUNDING)
    both.vision_model.set_attn_implementation("sdpa")
    torch.testing.assert_close(answer_of("clip", both), exact, **ROUNDING)
    both.vision_model.set_attn_implementation("attnzoo")
    torch.testing.assert_close(answer_of("clip", both), swapped, **ROUNDING)


def test_a_config_that_others_changed_does_not_pass_a_swap_by() -> None:
    model = make("bert")
    swapped = answer_of("bert", attnzoo.swap(model, "linear"))
    other = type(model)._from_config(model.config, attn_implementation="sdpa").eval()
    for _ in range(2):  # by another model made of it, then by hand
        with pytest.raises(
            ValueError,
            match="config of this swapped BertModel was set to the attention implementation "
            "'sdpa', which passes its swap by",
        ):
            model(tokens())
        model.set_attn_implementation("attnzoo")
        assert torch.equal(answer_of("bert", model), swapped)
        model.config._attn_implementation = "sdpa"
    other.set_attn_implementation("sdpa")  # nor is what is chosen for the other model
    with pytest.raises(ValueError, match="or with 'sdpa' to run without it"):
        model(tokens())


def test_copies_keep_what_was_chosen_and_choose_for_themselves() -> None:
    model = make("llama")
    exact = answer_of("llama", model)
    swapped = answer_of("llama", attnzoo.swap(model, "linear"))
    one = copy.deepcopy(model)
    one.set_attn_implementation("eager")
    two = pickle.loads(pickle.dumps(one))
    assert torch.equal(answer_of("llama", model), swapped)
    for copied in (one, two):
        assert torch.equal(answer_of("llama", copied), exact)
        copied.set_attn_implementation("attnzoo")
        assert torch.equal(answer_of("llama", copied), swapped)


def test_what_belongs_to_a_swap_is_refused_while_another_runs_and_the_other_way_round() -> None:
    model: Any = attnzoo.swap(make("llama"), "linear")
    with pytest.raises(ValueError, match="this LlamaForCausalLM is swapped, and a capture is of"):
        capture_tensors(model, tokens(), [0], is_causal=True)
    cache = attnzoo.state_cache(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="make a new cache with attnzoo"):
        model(tokens(), past_key_values=cache)
    capture_tensors(model, tokens(), [0], is_causal=True)
    assert model.config._attn_implementation == "sdpa"


def test_modules_that_are_of_another_class_while_swapped_follow_no_other_choice() -> None:
    model = make("t5")
    exact = answer_of("t5", model)
    swapped = answer_of("t5", attnzoo.swap(model, "sliding_window", window=3))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"call attnzoo\.unswap.* to run the swap$"):
        answer_of("t5", model)
    model.set_attn_implementation("attnzoo")
    assert torch.equal(answer_of("t5", model), swapped)
    model.set_attn_implementation("sdpa")
    assert torch.equal(answer_of("t5", attnzoo.unswap(model)), exact)
