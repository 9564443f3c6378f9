"""attnzoo.swap on transformers models: exact where the attention is exact, never ignored, undone
without a trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from swap_models import DECODERS, ENCODERS, answer, make, padded, tokens
from torch import Tensor, nn

import attnzoo
from attnzoo import UnsupportedError

#: float32 rounding of values of order 1 through three layers.
ROUNDING: Any = {"rtol": 0.0, "atol": 5e-6}
WITHOUT_OWN_WINDOW = [*DECODERS, "bert", "roberta"]


def cores(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, attnzoo.Attention)]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("family", WITHOUT_OWN_WINDOW)
def test_standard_is_eager(family: str, side: str) -> None:
    model, ids, mask = make(family), tokens(), padded(side)
    exact = answer(model, ids, attention_mask=mask)
    assert attnzoo.swap(model, "standard") is model
    swapped = answer(model, ids, attention_mask=mask)
    assert [core.last_backend for core in cores(model)] == ["sdpa"] * 3
    torch.testing.assert_close(swapped[mask.bool()], exact[mask.bool()], **ROUNDING)


@pytest.mark.parametrize("family", ["vit", "wav2vec2"])
def test_standard_is_eager_without_tokens(family: str) -> None:
    model = make(family)
    given = torch.randn(2, 3, 16, 16) if family == "vit" else torch.randn(2, 400)
    exact = answer(model, given)
    attnzoo.swap(model, "standard")
    torch.testing.assert_close(answer(model, given), exact, **ROUNDING)
    assert len(cores(model)) == 3 and all(core.last_backend for core in cores(model))


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_a_layer_left_alone_stays_exact(family: str) -> None:
    model, ids, mask = make(family), tokens(), padded("left")
    exact = answer(model, ids, attention_mask=mask)
    window: dict[str, Any] = {"window": 5} if family == "modernbert" else {"window": 100}
    layers = [1] if family == "modernbert" else [0, 2]
    attnzoo.swap(model, "sliding_window", layers=layers, **window)
    assert len(cores(model)) == len(layers)
    torch.testing.assert_close(
        answer(model, ids, attention_mask=mask)[mask.bool()], exact[mask.bool()], **ROUNDING
    )


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_sliding_window_is_mistrals_own(side: str) -> None:
    own, swapped, ids, mask = (
        make("mistral", sliding_window=6),
        make("mistral"),
        tokens(),
        padded(side),
    )
    attnzoo.swap(swapped, "sliding_window", window=6)
    expected = answer(own, ids, attention_mask=mask)
    torch.testing.assert_close(
        answer(swapped, ids, attention_mask=mask)[mask.bool()], expected[mask.bool()], **ROUNDING
    )
    attnzoo.swap(own, "sliding_window", window=6)
    torch.testing.assert_close(
        answer(own, ids, attention_mask=mask)[mask.bool()], expected[mask.bool()], **ROUNDING
    )


def test_a_window_of_the_models_own_is_not_dropped() -> None:
    model = make("mistral", sliding_window=6)
    with pytest.raises(
        UnsupportedError,
        match=r"layer 0 \(model.layers.0.self_attn\).*its own sliding window of 6.*window=6",
    ):
        attnzoo.swap(model, "standard")
    with pytest.raises(UnsupportedError, match="sliding window of 6"):
        attnzoo.swap(model, "sliding_window", window=7)
    with pytest.raises(UnsupportedError, match="sliding window of 5"):
        attnzoo.swap(make("modernbert"), "performer")
    assert model.config._attn_implementation == "eager" and not cores(model)
    model.config.sliding_window = None  # as the refusal says
    assert torch.equal(
        answer(attnzoo.swap(model, "linear"), tokens()),
        answer(attnzoo.swap(make("mistral"), "linear"), tokens()),
    )


@pytest.mark.parametrize("name", ["standard", "sliding_window", "bigbird", "linear", "performer"])
def test_left_padding_reaches_nothing(name: str) -> None:
    """What stands in padded slots changes no real row, bit for bit."""
    model, ids, mask = make("llama"), tokens(), padded("left")
    options: dict[str, Any] = {"sliding_window": {"window": 4}, "bigbird": {"block_size": 4}}.get(
        name, {}
    )
    attnzoo.swap(model, name, **options)
    other = ids.clone()
    other[1, :5] = 7
    before, after = (
        answer(model, given, attention_mask=mask)[mask.bool()] for given in (ids, other)
    )
    assert torch.equal(before, after)


def test_generation_of_mistral_with_its_cropped_cache() -> None:
    """Its cache keeps the last window - 1 keys only."""
    model = make("mistral", sliding_window=6)
    settings: dict[str, Any] = {
        "attention_mask": padded("left", 12),
        "max_new_tokens": 10,
        "do_sample": False,
        "pad_token_id": 0,
    }
    exact = model.generate(tokens(12), **settings)
    attnzoo.swap(model, "sliding_window", window=6)
    assert torch.equal(model.generate(tokens(12), **settings), exact)
    assert torch.equal(model.generate(tokens(12), use_cache=False, **settings), exact)


@pytest.mark.parametrize(
    ("family", "name"), [("bert", "performer"), ("bert", "linformer"), ("llama", "performer")]
)
def test_unswap_leaves_no_trace(family: str, name: str) -> None:
    model, ids = make(family), tokens()
    exact, keys, modules = (
        answer(model, ids),
        list(model.state_dict()),
        [path for path, _ in model.named_modules()],
    )
    attributes, generator = set(vars(model)), torch.get_rng_state()
    options: dict[str, Any] = {"max_length": 64} if name == "linformer" else {}
    attnzoo.swap(model, name, **options)
    if name == "performer":
        assert torch.equal(torch.get_rng_state(), generator)
    assert not torch.equal(answer(model, ids), exact)
    assert attnzoo.unswap(model) is model
    assert model.config._attn_implementation == "eager"
    assert (
        list(model.state_dict()) == keys
        and [path for path, _ in model.named_modules()] == modules
        and set(vars(model)) == attributes
    )
    assert torch.equal(answer(model, ids), exact)
    with pytest.raises(ValueError, match="is not swapped"):
        attnzoo.unswap(model)


def test_a_part_returns_the_weights_of_its_swap() -> None:
    model = attnzoo.swap(make("llama"), "sliding_window", window=2)
    found = model.model(tokens(), output_attentions=True).attentions
    assert len(found) == 3 and int((found[0] > 0).sum(-1).max()) == 2
    state = attnzoo.state_cache(attnzoo.swap(attnzoo.unswap(model), "linear"))
    with pytest.raises(UnsupportedError, match="a decoding state keeps no keys"):
        model(tokens(), past_key_values=state, use_cache=True, output_attentions=True)


def test_gradients_come_to_the_weights_that_are_returned() -> None:
    exact, swapped = make("llama"), attnzoo.swap(make("llama"), "standard")
    found = []
    for model in (exact, swapped):
        answer = model(tokens(), output_attentions=True)
        for weights in answer.attentions:
            weights.retain_grad()
        answer.logits.square().sum().backward()
        found.append([weights.grad for weights in answer.attentions])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_model_around_one_is_told_of_its_part() -> None:
    model = nn.Sequential(
        nn.Identity(),
        nn.ModuleDict({"bert": make("bert"), "head": nn.TransformerEncoderLayer(32, 4, 48, 0.0)}),
    )
    with pytest.raises(
        ValueError,
        match=r"Sequential holds a transformers model; swap that part alone: "
        r"model.get_submodule\('1.bert'\)",
    ):
        attnzoo.swap(model, "linear")
    attnzoo.swap(model.get_submodule("1.bert"), "linear")


def test_swapping_twice_is_refused() -> None:
    model = attnzoo.swap(make("bert"), "linear")
    with pytest.raises(ValueError, match="swapped already; call"):
        attnzoo.swap(model, "standard")


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_performer_trains(family: str) -> None:
    model = attnzoo.swap(make(family), "performer", num_features=16).train()
    answer(model, tokens(), attention_mask=padded("left"))[:, -1].square().sum().backward()
    wanted = (
        ("query.weight", "key.weight", "value.weight")
        if family == "bert"
        else ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    )
    gradients = [
        parameter.grad for name, parameter in model.named_parameters() if name.endswith(wanted)
    ]
    assert len(gradients) == 9 and all(
        gradient is not None and float(gradient.norm()) > 0 for gradient in gradients
    )
    assert all(core.training for core in cores(model))
    assert not any(core.training for core in cores(model.eval()))


def test_linformer_projections_are_learned_and_kept() -> None:
    model = attnzoo.swap(make("bert"), "linformer", max_length=32, rank=8)
    answer(model, tokens()).square().sum().backward()
    name = "encoder.layer.1.attention.self.attention_core.key_projection.weight"
    gradient = dict(model.named_parameters())[name].grad
    assert gradient is not None and float(gradient.norm()) > 0
    other = attnzoo.swap(make("bert"), "linformer", max_length=32, rank=8)
    with torch.no_grad():
        dict(other.named_parameters())[name].zero_()
    assert not torch.equal(answer(other, tokens()), answer(model, tokens()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(answer(other, tokens()), answer(model, tokens()))
    assert {core.key_projection.weight.dtype for core in cores(model.double())} == {torch.float64}


def test_layerwise_sharing_is_over_all_layers() -> None:
    model = attnzoo.swap(make("bert"), "linformer", max_length=32, rank=8, sharing="layerwise")
    assert len({id(core.key_projection) for core in cores(model)}) == 1


def test_layers_draw_differently() -> None:
    performers = cores(attnzoo.swap(make("bert"), "performer", num_features=16, seed=5))
    draws = [performer.state_dict() for performer in performers]
    keys = [key for key, value in draws[0].items() if value.is_floating_point()]
    assert keys and all(
        not torch.equal(draws[i][key], draws[j][key])
        for key in keys
        for i, j in ((0, 1), (1, 2), (0, 2))
    )
    assert [core.random.seed for core in cores(attnzoo.swap(make("bert"), "bigbird", seed=5))] == [
        5,
        6,
        7,
    ]
    assert [core.random.seed for core in cores(attnzoo.swap(make("bert"), "bigbird"))] == [0, 1, 2]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_deep_copy_is_a_model_of_its_own(family: str) -> None:
    model = make(family)
    exact = answer(model, tokens())
    copied = copy.deepcopy(attnzoo.swap(model, "linear"))
    swapped = answer(model, tokens())
    assert torch.equal(answer(copied, tokens()), swapped)
    attnzoo.unswap(copied)
    assert torch.equal(answer(copied, tokens()), exact) and torch.equal(
        answer(model, tokens()), swapped
    )


def test_linformer_in_a_decoder_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="linformer cannot be causal"):
        attnzoo.swap(make("llama"), "linformer", max_length=64)


def test_a_family_that_stays_eager_is_refused() -> None:
    import transformers as hf

    model = hf.XLMModel(hf.XLMConfig(vocab_size=50, emb_dim=32, n_layers=2, n_heads=4))
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedError, match="XLMModel does not let its attention be replaced"):
        attnzoo.swap(model, "standard")
    assert model.config._attn_implementation == before


def test_a_mask_of_the_callers_own() -> None:
    """Standard attention applies any 4-D mask; the others say that they cannot."""
    mask = torch.rand(2, 1, 24, 24, generator=torch.Generator().manual_seed(1)) < 0.6
    mask = (mask & torch.ones(24, 24, dtype=torch.bool).tril()) | torch.eye(24, dtype=torch.bool)
    model = make("llama", attn_implementation="sdpa")
    exact = answer(model, tokens(), attention_mask=mask)
    attnzoo.swap(model, "standard")
    torch.testing.assert_close(answer(model, tokens(), attention_mask=mask), exact, **ROUNDING)
    with pytest.raises(UnsupportedError, match="more than causality, padding and packing"):
        answer(attnzoo.swap(make("llama"), "performer"), tokens(), attention_mask=mask)


def test_dropout_of_attention() -> None:
    model = attnzoo.swap(make("llama", attention_dropout=0.5), "standard").train()
    assert not torch.equal(answer(model, tokens()), answer(model, tokens()))
    assert torch.equal(answer(model.eval(), tokens()), answer(model, tokens()))
    with pytest.raises(ValueError, match="swap does not take 'dropout'"):
        attnzoo.swap(make("llama"), "standard", dropout=0.1)


def test_a_scale_of_the_models_own() -> None:
    model = make("gpt2", scale_attn_by_inverse_layer_idx=True)
    exact = answer(model, tokens())
    attnzoo.swap(model, "standard")
    torch.testing.assert_close(answer(model, tokens()), exact, **ROUNDING)


@pytest.mark.parametrize("layers", [3, -1, "0-3", "0,9", "2-1", "x", [], [0, 0], True, 1.5])
def test_layers_outside_the_model(layers: Any) -> None:
    model = make("bert")
    with pytest.raises(ValueError, match=r"layers"):
        attnzoo.swap(model, "linear", layers=layers)
    assert not cores(model) and model.config._attn_implementation == "eager"


def test_a_mixed_model() -> None:
    mixed = attnzoo.swap(make("llama"), {"0-1": ("sliding_window", {"window": 4}), 2: "standard"})
    assert [core.spec.name for core in cores(mixed)] == [
        "sliding_window",
        "sliding_window",
        "standard",
    ]
    one = attnzoo.swap(make("llama"), "sliding_window", window=4, layers="0,1")
    torch.testing.assert_close(answer(mixed, tokens()), answer(one, tokens()), **ROUNDING)
    for bad, message in (
        ({"0-1": "standard", 1: "linear"}, "layer 1 is named twice"),
        ({}, "must be the name"),
        ({0: 3}, "3 must be the name"),
        ({"0-9": "linear"}, "0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            attnzoo.swap(make("llama"), bad)
    with pytest.raises(ValueError, match="layers goes with one name"):
        attnzoo.swap(make("llama"), {0: "linear"}, layers=1)


def test_unknown_names_and_models_without_attention() -> None:
    with pytest.raises(ValueError, match="did you mean 'performer'"):
        attnzoo.swap(make("bert"), "perfomer")
    with pytest.raises(ValueError, match="has no option 'windows'"):
        attnzoo.swap(make("bert"), "sliding_window", windows=3)
    with pytest.raises(ValueError, match="Linear has no attention"):
        attnzoo.swap(torch.nn.Linear(3, 3), "standard")


def test_counted_costs_are_the_closed_form() -> None:
    """BERT with 3 layers, width d = 32, inner width 48, pooler d²: every product by hand, attention
    by `cost`."""
    pytest.importorskip("fvcore")
    model, length = attnzoo.swap(make("bert"), "sliding_window", window=4), 24
    ids: Tensor = tokens(length, 1)
    core = cores(model)[0].cost(1, length).macs
    per_token = 4 * 32 * 32 + 2 * 32 * 48
    assert attnzoo.count_flops(model, ids).macs == 3 * (length * per_token + core) + 32 * 32


def test_counted_costs_of_a_decoder_are_the_closed_form() -> None:
    """Llama: q and o of d², k and v of half that, three products of the inner width, and the head
    over 50 words."""
    pytest.importorskip("fvcore")
    model, length = attnzoo.swap(make("llama"), "sliding_window", window=4), 24
    core = cores(model)[0].cost(1, length, kv_heads=2, is_causal=True).macs
    per_token = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    mask = torch.ones(1, length, dtype=torch.long)
    counted = attnzoo.count_flops(model, tokens(length, 1), attention_mask=mask, use_cache=False)
    assert counted.macs == 3 * (length * per_token + core) + length * 32 * 50


def test_a_layer_left_alone_keeps_its_own_window() -> None:
    model, ids, mask = make("mistral", sliding_window=6), tokens(), padded("left")
    exact = answer(model, ids, attention_mask=mask)
    attnzoo.swap(model, "sliding_window", window=6, layers=1)
    torch.testing.assert_close(
        answer(model, ids, attention_mask=mask)[mask.bool()], exact[mask.bool()], **ROUNDING
    )


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["standard", "bigbird"])
def test_a_swapped_encoder_compiles_in_one_graph(name: str) -> None:
    model, mask = attnzoo.swap(make("bert"), name), padded("right")
    expected = answer(model, tokens(), attention_mask=mask)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        answer(compiled, tokens(), attention_mask=mask)[mask.bool()],
        expected[mask.bool()],
        **ROUNDING,
    )
