"""A of every layer of a model while it reads: as transformers' eager attention returns it, as what
was swapped in forms it, and of recurrent layers, whose rows it makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
import biased_models
from small import small
from swap_models import answer_of, inputs_of, make, tokens
from test_fallbacks import FAMILIES, ids
from test_fallbacks import make as make_hybrid

import attnzoo

#: Qwen4's indexed layers read masks of 4 dimensions alone, which a trial does not give them.
HYBRIDS = [family for family in FAMILIES if family != "qwen4_exp"]
SELF = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")


def eager_maps(answer: Any) -> list[Tensor]:
    """A of every layer, encoder before decoder before cross-attention."""
    found = [getattr(answer, name, None) or () for name in SELF]
    return [a for some in found for a in some if a is not None]


@pytest.mark.parametrize(
    "family", ["bert", "gpt2", "llama", "qwen3", "gemma2", "vit", "t5_whole", "bart"]
)
def test_exact_layers_show_what_eager_returns(family: str) -> None:
    model, inputs = make(family), inputs_of(family)
    before, keys = answer_of(family, model), list(model.state_dict())
    expected = eager_maps(model(**inputs, output_attentions=True))
    with attnzoo.attention_maps(model) as maps:
        model(**inputs)
    assert len(maps) == len(expected) == len(maps.as_tuple()) == len(maps.paths)
    for a, b in zip(maps.as_tuple(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert torch.equal(answer_of(family, model), before)
    assert list(model.state_dict()) == keys and model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon"])
def test_families_without_the_interface(family: str) -> None:
    model = biased_models.make(family)
    before = biased_models.answer(family, model)
    with attnzoo.attention_maps(model) as maps:
        rows = biased_models.answer(family, model)
    torch.testing.assert_close(rows, before)
    assert torch.equal(biased_models.answer(family, model), before)
    sums = maps[0].sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_a_swapped_layer_shows_its_own_and_the_others_theirs() -> None:
    model = make("llama")
    whole = eager_maps(model(tokens(), output_attentions=True))
    attnzoo.swap(model, "sliding_window", layers=1, window=3)
    with attnzoo.attention_maps(model) as maps:
        rows = model(tokens()).logits
    assert maps.paths == [f"model.layers.{layer}.self_attn" for layer in range(3)]
    torch.testing.assert_close(maps[0], whole[0])
    visible = (maps["model.layers.1.self_attn"] > 0).sum(-1)
    assert visible.max() == 3 and visible[..., 0].max() == 1
    assert torch.equal(rows, model(tokens()).logits)


def test_gates_of_a_swap_are_in_its_map() -> None:
    model = make("llama")
    attnzoo.swap(model, "gated_deltanet")
    attention = model.model.layers[0].self_attn
    values: list[Tensor] = []
    hook = attention.v_proj.register_forward_hook(lambda _, __, out: values.append(out))
    rows: list[Tensor] = []
    after = attention.o_proj.register_forward_pre_hook(lambda _, given: rows.append(given[0]))
    with attnzoo.attention_maps(model, layers=0) as maps:
        model(tokens())
    hook.remove()
    after.remove()
    v = values[0].unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(2, 1)
    torch.testing.assert_close((maps[0] @ v).transpose(1, 2).flatten(2), rows[0])
    assert list(maps) == [0] and len(maps) == 1


@pytest.mark.parametrize("family", HYBRIDS)
def test_recurrent_layers_have_a_map(family: str) -> None:
    model = make_hybrid(family)
    before = model(ids(2, 9), use_cache=False).logits
    with attnzoo.attention_maps(model) as maps:
        inside = model(ids(2, 9)).logits  # though a cache is filled
    torch.testing.assert_close(inside, before, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(ids(2, 9), use_cache=False).logits, before)
    assert len(maps) == len(maps.paths) >= 2
    for a in maps.as_tuple():
        assert a.shape == (2, 4, 9, 9) and not a.triu(1).any() and a.abs().sum() > 0


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])
def test_a_recurrent_map_makes_the_rows(family: str) -> None:
    from attnzoo.conventions import gated_delta

    model, seen = make_hybrid(family), []
    own = gated_delta.run

    def run(attention: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows, state = own(attention, q, k, v, *args, **kwargs)
        seen.append((v, rows))
        return rows, state

    gated_delta.run = run
    try:
        with attnzoo.attention_maps(model) as maps:
            model(ids(2, 9))
    finally:
        gated_delta.run = own
    v, rows = next(pair for pair in seen if pair[0].shape[2] == 9)  # behind the trial's
    torch.testing.assert_close(maps[0] @ v, rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_next", "mamba2"])  # whose first layer is recurrent
@pytest.mark.parametrize("side", ["left", "inside", "right"])
def test_padding_moves_no_row_of_a_recurrent_map(family: str, side: str) -> None:
    model, given, mask = make_hybrid(family), ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, {"left": [0, 1, 2], "inside": [2, 4, 5], "right": [6, 7, 8]}[side]] = 0
    real = mask[0].nonzero()[:, 0]
    with attnzoo.attention_maps(model, layers=0) as maps:
        model(given, attention_mask=mask, use_cache=False)
        padded = maps[0][0]
        model(given[:1, real], use_cache=False)
        alone = maps[0][0]
    torch.testing.assert_close(padded[:, real][..., real], alone, rtol=1e-4, atol=1e-5)
    hidden = mask[0] == 0
    assert not padded[..., hidden].any() and not padded[:, hidden].any()


def mamba(kind: str) -> Any:
    import transformers

    torch.manual_seed(0)
    own = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 1} | {
        "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts_per_tok": 1,
        "intermediate_size": 24, "mamba_d_state": 4, "use_mamba_kernels": False,
    }  # fmt: skip
    more = own if kind == "Jamba" else {"state_size": 4}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50}
    config = getattr(transformers, f"{kind}Config")(**sizes, **more)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    for name, weight in model.named_parameters():
        if "proj" in name:
            weight.data.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba", "Jamba"])
def test_the_map_of_a_scan_makes_the_rows(kind: str) -> None:
    model = mamba(kind)
    path = "layers.0.mamba" if kind == "Jamba" else "layers.0.mixer"
    layer, seen = model.get_submodule(path), {}
    layer.x_proj.register_forward_pre_hook(lambda _, given: seen.update(u=given[0]))
    layer.in_proj.register_forward_hook(lambda _, __, out: seen.update(gate=out.chunk(2, -1)[1]))
    layer.out_proj.register_forward_pre_hook(lambda _, given: seen.update(rows=given[0]))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 7:] = 0
    with attnzoo.attention_maps(model) as maps, torch.no_grad():
        model(ids(2, 9), attention_mask=mask)  # though a cache is filled
    channels, u = maps[0].shape[1], seen["u"].transpose(1, 2)
    assert maps.paths[0] == path and maps[0].shape == (2, channels, 9, 9) and channels == u.shape[1]
    rows = (maps[0] @ u[..., None])[..., 0] + layer.D[:, None] * u
    made = rows.transpose(1, 2) * nn.functional.silu(seen["gate"])
    torch.testing.assert_close(made[0], seen["rows"][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(made[1, :7], seen["rows"][1, :7], rtol=1e-4, atol=1e-6)
    assert not maps[0][1, :, 7:].any() and not maps[0][1, ..., 7:].any()
    cache = model(ids(2, 9), use_cache=True)
    name = "cache_params" if "cache_params" in cache else "past_key_values"
    with attnzoo.attention_maps(model) as maps, torch.no_grad():
        model(ids(2, 1), use_cache=True, **{name: cache[name]})
    assert path not in [maps.paths[layer] for layer in maps]


def test_replaced_and_swapped_hybrids_stay_so() -> None:
    model = make_hybrid("qwen3_next")
    attnzoo.replace_fallbacks(model)
    attnzoo.swap(model, "sliding_window", window=2)
    with attnzoo.attention_maps(model) as maps:
        model(ids(1, 6))
    assert [int((a != 0).sum(-1).max()) for a in maps.as_tuple()] == [6, 2]
    assert attnzoo.restore_fallbacks(attnzoo.unswap(model)) is model


def test_torch_and_timm_models() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 16)
    expected = layer_weights(model.layers[0], x)
    with attnzoo.attention_maps(model) as maps, torch.no_grad():
        model(x)
    torch.testing.assert_close(maps[0].mean(1), expected)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    own = attnzoo.MultiheadAttention(16, 2, batch_first=True, attention="linear")
    holder = nn.Sequential(own)
    with attnzoo.attention_maps(holder) as maps:
        _, weights = own(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(maps[0], weights)


def layer_weights(layer: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer.self_attn(x, x, x)[1]


def convolutions() -> nn.Module:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], num_channels=3)
    return ResNetModel(config)


def test_layers_and_misuse() -> None:
    model = make("llama")
    with attnzoo.attention_maps(model, layers="1-2") as maps:
        model(tokens())
        assert list(maps) == [1, 2]
    with pytest.raises(KeyError, match=r"layer -1 is none of the 3 attentions"):
        maps[-1]
    with pytest.raises(KeyError, match=r"layer 9 is none of the 3 attentions"):
        maps[9]
    with pytest.raises(KeyError, match=r"has no attention 'here'; it has model\.layers\.0"):
        maps["here"]
    with pytest.raises(KeyError, match=r"has shown no A: run model"):
        maps[0]
    for wrong, asked, sentence in (
        (model, 7, r"it has 3 attention layers, 0 to 2"),
        (nn.Linear(2, 2), None, r"has no attention"),
        (convolutions(), None, r"ResNetModel has no attention that attnzoo can show"),
    ):
        with pytest.raises(ValueError, match=sentence), attnzoo.attention_maps(wrong, asked):
            pass
    with pytest.raises(RuntimeError, match="mine"), attnzoo.attention_maps(model):
        raise RuntimeError("mine")
    assert model.config._attn_implementation == "eager"
    hybrid = make_hybrid("qwen3_next")
    cache = hybrid(ids(1, 6), use_cache=True).past_key_values
    refused = pytest.raises(attnzoo.UnsupportedError, match=r"give the whole text in one call")
    with attnzoo.attention_maps(hybrid), refused:
        hybrid(ids(1, 3), past_key_values=cache)


def test_a_state_shows_no_map() -> None:
    model = make("llama")
    attnzoo.swap(model, "linear", **small("linear"))
    with attnzoo.attention_maps(model) as maps:
        model(tokens(), past_key_values=attnzoo.state_cache(model), use_cache=True)
    assert len(maps) == 0
