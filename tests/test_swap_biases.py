"""Models that add a bias by distance to their scores, or cap them, swapped: standard attention is
the model's own, and sparse attention is the model's own with the same support."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import transformers as hf
from biased_models import (
    DECODER_LENGTH,
    DECODERS,
    FAMILIES,
    LENGTH,
    answer,
    inputs_of,
    make,
    source_of,
)
from small import small
from torch import Tensor

import attnzoo
from attnzoo import UnsupportedError
from attnzoo.registry import options_of

CLOSE: Any = {"rtol": 1e-5, "atol": 1e-5}
SPARSE: dict[str, dict[str, Any]] = {
    "sliding_window": {"window": 4},
    "bigbird": {"block_size": 2, "num_random_blocks": 1},
}


def cores(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, attnzoo.Attention)]


def gradients(family: str, model: Any, side: str | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and gradients of all parameters by name."""
    model.zero_grad()
    out = answer(family, model, side)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return out.detach(), {
        name: x.grad for name, x in model.named_parameters() if x.grad is not None
    }


def assert_same(found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, Any]) -> None:
    torch.testing.assert_close(found[0], wanted[0], **CLOSE)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        size = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(
            found[1][name] / size, gradient / size, **CLOSE, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_standard_is_the_models_own(family: str, side: str | None) -> None:
    """Logits and gradients, the learned table's too."""
    wanted = gradients(family, make(family), side)
    assert_same(gradients(family, attnzoo.swap(make(family), "standard"), side), wanted)
    if family == "t5":
        assert any("relative_attention_bias" in name for name in wanted[1])


def support_of(core: Any, length: int, is_causal: bool) -> Tensor:
    """What its queries see, (1, heads, length, length)."""
    x = torch.randn(1, core.heads, length, core.head_dim)
    bias = torch.zeros(core.heads, 2 * length - 1)
    return core.weights(x, x, is_causal=is_causal, distance_bias=bias) > 0


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "switch"])
def test_sparse_is_the_models_own_with_the_same_support(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own attention under a dense mask of the pattern."""
    swapped = attnzoo.swap(make(family), name, **SPARSE[name])
    found = gradients(family, swapped)
    seen = {
        True: support_of(
            cores(swapped)[-1], LENGTH if family in DECODERS else DECODER_LENGTH, True
        ),
        False: None if family in DECODERS else support_of(cores(swapped)[0], LENGTH, False),
    }

    def mask(is_causal: bool) -> Any:
        def own(*args: Any, encoder_hidden_states: Any = None, **kwargs: Any) -> Tensor | None:
            visible = seen[is_causal]
            if encoder_hidden_states is not None or visible is None:
                return None
            return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)

        return own

    source = source_of(family)
    monkeypatch.setattr(source, "create_causal_mask", mask(True))
    if family not in DECODERS:
        monkeypatch.setattr(source, "create_bidirectional_mask", mask(False))
    assert_same(found, gradients(family, make(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_as_wide_as_the_text_is_the_models_own(family: str) -> None:
    """Also where a model makes a 4-D mask of one row for all queries."""
    for side in (None, "left", "right"):
        wanted = answer(family, make(family), side)
        model = attnzoo.swap(make(family), "sliding_window", window=20)
        torch.testing.assert_close(answer(family, model, side), wanted, **CLOSE)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_the_bias_comes_by_distance(family: str) -> None:
    """No tensor of queries by keys reaches an attention, and T5 makes none for one; no distance
    that a window hides does either."""
    model = attnzoo.swap(make(family, layers=2), "sliding_window", window=4)
    given: list[Any] = []

    def note(core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append((kwargs["distance_bias"].shape[1], kwargs["attn_mask"]))

    for core in cores(model):
        core.register_forward_pre_hook(note, with_kwargs=True)
    looked_up: list[Tensor] = []
    for module in model.modules():
        if hasattr(module, "relative_attention_bias"):
            table = module.relative_attention_bias
            table.register_forward_hook(lambda table, args, out: looked_up.append(args[0]))
    answer(family, model)
    assert bool(looked_up) == (family not in DECODERS)
    assert all(buckets.numel() <= 4 for buckets in looked_up)
    assert given and all(width == 7 and mask is None for width, mask in given)


def greedy(model: Any, family: str, **more: Any) -> Tensor:
    given = inputs_of(family, "left")
    given.pop("decoder_input_ids", None)
    return model.generate(**given, max_new_tokens=6, do_sample=False, **more)


@pytest.mark.parametrize("second", [("sliding_window", {"window": 3}), "standard"])
@pytest.mark.parametrize("family", ["t5", "umt5", *DECODERS])
def test_generation(family: str, second: Any) -> None:
    """With the model's cache and none, from bounded states, and with a static cache; layers beside
    one another that see less and more."""
    plain = greedy(make(family), family)
    model = attnzoo.swap(make(family), "standard")
    assert torch.equal(greedy(model, family), plain)
    if family != "mpt":  # whose config decides of the cache alone
        assert torch.equal(greedy(model, family, use_cache=False), plain)
        static = greedy(model, family, cache_implementation="static", disable_compile=True)
        assert torch.equal(static, plain)
    plain = greedy(make(family, layers=2), family)
    model = attnzoo.swap(make(family, layers=2), "standard", layers=[1])
    assert torch.equal(greedy(model, family), plain)
    model = make(family, layers=2)
    part = model if family in DECODERS else model.get_decoder()
    attnzoo.swap(part, {0: ("sliding_window", {"window": 4}), 1: second})
    wanted = greedy(model, family)
    cache: Any = attnzoo.state_cache(part)
    if part is not model:
        cache = hf.EncoderDecoderCache(cache, hf.DynamicCache())
    assert torch.equal(greedy(model, family, past_key_values=cache), wanted)


@pytest.mark.parametrize("family", ["t5", "umt5", *DECODERS])
def test_one_layer_alone_and_what_is_left_of_a_swap(family: str, tmp_path: Path) -> None:
    """The other layers stay exact; copies, files, and the way back."""
    model = make(family, layers=2)
    wanted, config = answer(family, model), model.config
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    attnzoo.swap(model, "standard", layers=[1])
    torch.testing.assert_close(answer(family, model), wanted, **CLOSE)
    attnzoo.unswap(model)
    attnzoo.swap(model, "sliding_window", layers=[1], window=3)
    found = answer(family, model)
    assert not torch.allclose(found, wanted, **CLOSE)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(answer(family, other), found)
        attnzoo.unswap(other)
        assert torch.equal(answer(family, other), wanted)
    attnzoo.save(model, tmp_path / "swap.safetensors")
    loaded = attnzoo.load(make(family, layers=2), tmp_path / "swap.safetensors")
    assert torch.equal(answer(family, loaded), found)
    attnzoo.unswap(model)
    assert torch.equal(answer(family, model), wanted)
    assert [type(m) for m in model.modules()] == classes and list(model.state_dict()) == keys
    assert model.config is config
    attnzoo.swap(model, "standard")
    model.config.eos_token_id = 3  # what is set since stays
    assert attnzoo.unswap(model).config.eos_token_id == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_another_model_of_the_config_stays_as_it_is(family: str) -> None:
    model = make(family)
    torch.manual_seed(0)
    other = type(model)(model.config).eval()
    wanted = answer(family, other, "left")
    attnzoo.swap(model, "sliding_window", window=3)
    torch.testing.assert_close(answer(family, other, "left"), wanted, **CLOSE)
    with pytest.raises(UnsupportedError):
        attnzoo.swap(other, "performer")
    torch.testing.assert_close(answer(family, other, "left"), wanted, **CLOSE)


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_a_model_built_with_the_config_of_a_swapped_one(family: str) -> None:
    """Its own attention would take the masks for others; the swapped one still runs."""
    model = attnzoo.swap(make(family), "standard")
    wanted = answer(family, model)
    for config in (model.config, copy.deepcopy(model.config)):
        other = type(model)(config).eval()
        with pytest.raises(UnsupportedError, match=f"this {family} model is not swapped"):
            answer(family, other)
    assert torch.equal(answer(family, model), wanted)


@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon"])
def test_a_refused_swap_leaves_the_model_as_it_was(family: str) -> None:
    model = make(family)
    config, classes = model.config, [type(m) for m in model.modules()]
    with pytest.raises(UnsupportedError, match="performer would drop; use one of standard, "):
        attnzoo.swap(model, "performer")
    assert model.config is config and [type(m) for m in model.modules()] == classes
    assert config._attn_implementation != "attnzoo" and not hasattr(config, "attnzoo_swaps")


def test_what_is_refused() -> None:
    model = make("gemma2")
    for name in attnzoo.names():
        taken = [option.name for option in options_of(name)]
        if "softcap" not in taken and attnzoo.describe(name).spec.causal:
            refusal = rf"caps its scores \(softcap=1\.5\), which {name} would drop; use one of"
            with pytest.raises(UnsupportedError, match=refusal):
                attnzoo.swap(model, name, **small(name))
    with pytest.raises(ValueError, match="swap does not take 'softcap'"):
        attnzoo.swap(model, "standard", softcap=3.0)
    attnzoo.swap(model, "standard")
    attention = model.model.layers[0].self_attn
    attention.attn_logit_softcapping = 9.0
    with pytest.raises(UnsupportedError, match=r"softcap=9\.0 now, .* softcap=1\.5; unswap"):
        answer("gemma2", model)
    model = attnzoo.swap(make("mpt"), "standard")
    with pytest.raises(UnsupportedError, match="makes a bool of every mask"):
        greedy(model, "mpt", cache_implementation="static", disable_compile=True)
    model = make("bloom")
    model.transformer.h[0].self_attention.forward = lambda *args, **kwargs: None
    with pytest.raises(UnsupportedError):
        attnzoo.swap(model, "standard")


def test_falcon_without_alibi() -> None:
    torch.manual_seed(0)
    config = hf.FalconConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        eos_token_id=None,
    )
    model = hf.FalconForCausalLM(config).eval()
    wanted = answer("falcon", model, "left")
    swapped = attnzoo.swap(copy.deepcopy(model), "standard")
    torch.testing.assert_close(answer("falcon", swapped, "left"), wanted, **CLOSE)
    attnzoo.swap(model, "performer", num_features=16)
    assert not torch.allclose(answer("falcon", model, "left"), wanted, **CLOSE)


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["t5", "bloom"])
def test_one_graph(family: str) -> None:
    model = attnzoo.swap(make(family), "sliding_window", window=4)
    given = {**inputs_of(family), "use_cache": False}
    wanted = model(**given).logits
    graph = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(graph(**given).logits, wanted)
