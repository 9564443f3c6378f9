"""attnzoo.swap, family by family and variant by variant: it runs and can prove it, or it is refused
in a sentence; nothing between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from small import cannot, in_models, of_each_folder, small
from stages import staged
from swap_models import answer, answer_of, inputs_of, make, tokens
from torch import Tensor

import attnzoo
from attnzoo import UnsupportedError

ROUNDING: Any = {"rtol": 0.0, "atol": 5e-6}
SPECS = {name: attnzoo.describe(name).spec for name in attnzoo.names()}
UNWINDOWED = [name for name in SPECS if name != "sliding_window"]
WITHOUT_BIAS = {
    name: "adds a position_bias to its scores"
    for name, spec in SPECS.items()
    if not spec.attn_mask and not spec.takes("distance_bias")
}


def unable(is_causal: bool, layer: str = "") -> dict[str, str]:
    """What variants say that cannot be causal, or nothing but causal, and of which layer."""
    return {
        name: rf"{layer}.*{cannot(name, is_causal)}"
        for name, spec in SPECS.items()
        if not spec.runs(is_causal)
    }


#: Of every family: the sites that a swap finds, and the refusals of the variants that cannot take
#: its place.
FAMILIES: dict[str, tuple[int, dict[str, str]]] = {
    "bert": (3, unable(False)),
    "roberta": (3, unable(False)),
    "modernbert": (
        3,
        {**dict.fromkeys(UNWINDOWED, r"layer 1 \(layers.1.attn\): .*window of 5"), **unable(False)},
    ),
    "gpt2": (3, unable(True, r"layer 0 \(transformer.h.0.attn\): ")),
    "llama": (3, unable(True)),
    "mistral": (3, unable(True)),
    "qwen2": (3, unable(True)),
    "qwen3": (3, unable(True)),
    "gemma2": (3, {**dict.fromkeys(UNWINDOWED, "window of 6"), **unable(True)}),
    "vit": (3, unable(False)),
    "wav2vec2": (3, unable(False)),
    "t5": (2, {**WITHOUT_BIAS, **unable(False)}),
    "t5_whole": (4, {**WITHOUT_BIAS, **unable(False)}),
    "bart": (
        4,
        {
            **unable(True, r"layer 2 \(model.decoder.layers.0.self_attn\): "),
            **unable(False, r"layer 0 "),
        },
    ),
    "clip": (
        6,
        {
            **unable(True, r"layer 3 \(text_model.encoder.layers.0.self_attn\): "),
            **unable(False, r"layer 0 "),
        },
    ),
}


def cores(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, attnzoo.Attention)]


def moved(swapped: Tensor, exact: Tensor) -> bool:
    """Whether more than rounding differs."""
    return float((swapped - exact).detach().abs().max()) > 10 * ROUNDING["atol"]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        # Every family with one variant of each engine and with one of the others, in turn
        staged(family, name, first=name in of_each_folder() or (place - number) % 22 == 0)
        for number, family in enumerate(FAMILIES)
        for place, name in enumerate(in_models())
    ],
)
def test_it_runs_or_is_refused(family: str, name: str, tmp_path: Path) -> None:
    sites, refusals = FAMILIES[family]
    model, options = make(family), small(name)
    exact, keys, before = (
        answer_of(family, model),
        list(model.state_dict()),
        model.config._attn_implementation,
    )
    if name in refusals:
        with pytest.raises(UnsupportedError, match=refusals[name]):
            attnzoo.swap(model, name, **options)
        assert (
            not cores(model)
            and torch.equal(answer_of(family, model), exact)
            and model.config._attn_implementation == before
        )
        return
    attnzoo.swap(model, name, **options)
    swapped = answer_of(family, model)
    assert len(cores(model)) == sites and all(core.last_backend for core in cores(model))
    if SPECS[name].family == "exact":
        torch.testing.assert_close(swapped, exact, **ROUNDING)
    else:
        assert moved(swapped, exact)
    attnzoo.save(model, tmp_path / "swap.safetensors")
    assert torch.equal(
        answer_of(family, attnzoo.load(make(family), tmp_path / "swap.safetensors")), swapped
    )
    attnzoo.unswap(model)
    assert torch.equal(answer_of(family, model), exact) and list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("family", "options", "sentence"),
    [
        (
            "splinter",
            {"question_token_id": 1},
            "SplinterSelfAttention says is_causal=True and is given a mask that is not causal",
        ),
        (
            "pegasus_x",
            {},
            "PegasusXAttention says is_causal=False and is given a mask that is causal",
        ),
    ],
)
def test_what_would_be_dropped_is_refused(
    family: str, options: dict[str, Any], sentence: str
) -> None:
    for name in attnzoo.names():
        with pytest.raises(UnsupportedError, match=sentence):
            attnzoo.swap(make(family, **options), name, **small(name))


def test_a_family_with_a_use_of_its_own_for_the_mask() -> None:
    """Doge cuts a mask of four dimensions. Padding, which brings one, is tried at the swap and does
    not wait for the first batch."""
    model = make("doge")
    with pytest.raises(
        UnsupportedError, match=r"could not be tried out with a few input_ids .*dimension"
    ):
        attnzoo.swap(model, "standard")
    assert not cores(model) and model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("family", "unread", "part"),
    [
        ("llava", "model.vision_tower.encoder.layers.0.self_attn", "model.vision_tower"),
        # Whose config tells no size of an image.
        (
            "qwen2_vl",
            "model.visual.blocks.0.attn",
            "model.visual",
        ),
    ],
)
def test_layers_that_a_few_tokens_do_not_reach(family: str, unread: str, part: str) -> None:
    """They would stay exact and nobody would know; the half that reads text is swapped alone."""
    model = make(family)
    exact = answer(model, tokens())
    sentence = (
        f"does not reach {unread} by a few input_ids.* model.get_submodule(...) of "
        f"'model.language_model' and of '{part}'"
    )
    with pytest.raises(UnsupportedError, match=sentence.replace("(...)", r"\(\.\.\.\)")):
        attnzoo.swap(model, "linear")
    assert not cores(model) and torch.equal(answer(model, tokens()), exact)
    half = model.get_submodule("model.language_model")
    attnzoo.swap(half, "standard")
    torch.testing.assert_close(answer(model, tokens()), exact, **ROUNDING)
    attnzoo.swap(attnzoo.unswap(half), "linear")
    assert moved(answer(model, tokens()), exact) and all(core.last_backend for core in cores(model))


def test_local_and_global_layers_of_modernbert() -> None:
    """One global layer, then two of |i - j| < 5: the global one takes any variant, the local ones a
    window within their own."""
    model = make("modernbert")
    exact = answer_of("modernbert", model)
    attnzoo.swap(model, {0: "standard", "1-2": ("sliding_window", {"window": 5})})
    torch.testing.assert_close(answer_of("modernbert", model), exact, **ROUNDING)
    attnzoo.swap(attnzoo.unswap(model), "linear", layers=0)
    assert moved(answer_of("modernbert", model), exact) and len(cores(model)) == 1
    attnzoo.unswap(model)
    with pytest.raises(
        UnsupportedError, match=r"layer 2 .*window of 5, which sliding_window would drop"
    ):
        attnzoo.swap(
            model, {1: ("sliding_window", {"window": 5}), 2: ("sliding_window", {"window": 6})}
        )
    assert torch.equal(answer_of("modernbert", model), exact)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_layers_of_gemma2_in_turn(softcap: float | None) -> None:
    """All of them, and some: a layer left alone keeps its window and its softcap."""
    model = make("gemma2", attn_logit_softcapping=softcap)
    exact = answer_of("gemma2", model)
    for mix in ({"0,2": ("sliding_window", {"window": 6}), 1: "standard"}, {1: "standard"}):
        attnzoo.swap(model, mix)
        torch.testing.assert_close(answer_of("gemma2", model), exact, **ROUNDING)
        assert len(cores(model)) == (3 if len(mix) == 2 else 1)
        attnzoo.unswap(model)


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("bart", "get_encoder"),
        ("bart", "get_decoder"),
        ("t5_whole", "get_encoder"),
        ("clip", "vision_model"),
        ("clip", "text_model"),
    ],
)
def test_a_part_of_a_composite_model(family: str, part: str) -> None:
    model = make(family)
    exact = answer_of(family, model)
    found: Any = getattr(model, part)
    piece = found() if part.startswith("get_") else found
    attnzoo.swap(piece, "standard")
    torch.testing.assert_close(answer_of(family, model), exact, **ROUNDING)
    assert (
        all(core.last_backend for core in cores(model))
        and len(cores(model)) == len(cores(piece)) > 0
    )
    with pytest.raises(ValueError, match=r"is not swapped, but its part [\w.]+ is; give that one"):
        attnzoo.unswap(model)
    with pytest.raises(
        ValueError,
        match=rf"{part.removeprefix('get_')} of this \w+ is swapped already; call "
        rf"attnzoo.unswap on it first",
    ):
        attnzoo.swap(model, "linear")
    attnzoo.unswap(piece)
    attnzoo.swap(model, "standard")
    with pytest.raises(ValueError, match="is part of a model that is swapped already"):
        attnzoo.swap(piece, "standard")
    attnzoo.unswap(model)
    assert torch.equal(answer_of(family, model), exact)


def test_both_halves_of_bart() -> None:
    """Linformer reads the source, a window writes; the decoder's look at its encoder stays
    exact."""
    model = make("bart")
    exact = answer_of("bart", model)
    attnzoo.swap(
        model, {"0-1": ("linformer", small("linformer")), "2-3": ("sliding_window", {"window": 3})}
    )
    assert moved(answer_of("bart", model), exact) and all(
        core.last_backend for core in cores(model)
    )
    assert [core.spec.name for core in cores(model)] == [
        "linformer",
        "linformer",
        "sliding_window",
        "sliding_window",
    ]
    encoder = make("bart").get_encoder()
    attnzoo.swap(encoder, "linear")
    attnzoo.swap(attnzoo.unswap(encoder), "performer")


@pytest.mark.parametrize("family", ["t5_whole", "bart"])
def test_generation_of_an_encoder_decoder(family: str) -> None:
    model = make(family)
    settings: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    ids = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(3))
    exact = model.generate(ids, **settings)
    attnzoo.swap(model, "standard")
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids, **settings, **cache), exact)


def test_the_position_bias_of_t5_is_learned() -> None:
    model = make("t5")
    weight = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"

    def gradient() -> Any:
        model.zero_grad()
        answer = answer_of("t5", model)
        (
            answer * torch.randn(answer.shape, generator=torch.Generator().manual_seed(5))
        ).sum().backward()
        return dict(model.named_parameters())[weight].grad.clone()

    exact = gradient()
    attnzoo.swap(model, "standard")
    torch.testing.assert_close(gradient(), exact, rtol=1e-4, atol=1e-5)
    assert float(exact.norm()) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_weights_are_returned(family: str) -> None:
    """Asked for in a call or in the config: exact layers return what eager ones do."""
    layers = {"modernbert": 0, "gemma2": 1}.get(family)  # those without a window of their own
    inputs = inputs_of(family)
    exact = attentions(make(family)(**inputs, output_attentions=True))
    model = attnzoo.swap(make(family), "standard", layers=layers)
    swapped = attentions(model(**inputs, output_attentions=True))
    asking = attnzoo.swap(make(family, output_attentions=True), "standard", layers=layers)
    for found in (swapped, attentions(asking(**inputs))):
        assert len(found) == len(exact)
        for a, b in zip(found, exact, strict=True):
            empty = (a == 0).all(-1, keepdim=True)  # where eager has the mean of v
            torch.testing.assert_close(a, b.masked_fill(empty, 0.0), **ROUNDING)
    assert not attentions(model(**inputs))


def attentions(answer: Any) -> list[Tensor]:
    names = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
    found = [getattr(answer, name, None) or () for name in names]
    return [a for some in found for a in some if a is not None]


def test_dropout_that_a_variant_never_forms_is_told_of_at_the_swap() -> None:
    sentence = (
        "LlamaAttention drops entries of A with probability 0.5 while training, which performer "
        "never forms; to train it, build"
    )
    training = make("llama", attention_dropout=0.5).train()
    with pytest.raises(
        UnsupportedError, match=rf"layer 0 \(model.layers.0.self_attn\): {sentence}"
    ):
        attnzoo.swap(training, "performer")
    assert not cores(training)
    evaluated = make("llama", attention_dropout=0.5)
    with pytest.warns(UserWarning, match=sentence) as caught:
        attnzoo.swap(evaluated, "performer")
    assert {warning.filename for warning in caught} == {__file__}
    answer_of("llama", evaluated)
    with pytest.raises(UnsupportedError, match=sentence):
        answer_of("llama", evaluated.train())
