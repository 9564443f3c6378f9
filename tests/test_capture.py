"""What is captured from a transformers model reproduces that model's own attention."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.fidelity.pretrained import Pretrained, capture, capture_tensors, load, select_heads
from attnzoo.packages import MissingPackageError
from attnzoo.texts.plays import play

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'attnzoo[models]'"
)

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "vocab_size": 60,
    "max_position_embeddings": 64,
}


def tiny_llama() -> Any:
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=6, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config).eval()


def tiny_bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**SIZES, num_attention_heads=4)).eval()


def own_attention_outputs(model: Any, modules: list[Any], ids: Tensor, heads: int) -> list[Tensor]:
    """What the model itself hands to each of the projections behind attention, (1, heads, length,
    head_dim)."""
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for module in modules
    ]
    with torch.no_grad():
        model.base_model(ids)
    for hook in hooks:
        hook.remove()
    return [out.unflatten(2, (heads, -1)).transpose(1, 2) for out in seen]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_captured_tensors_reproduce_the_models_own_attention(family: str) -> None:
    causal = family == "llama"
    model = tiny_llama() if causal else tiny_bert()
    heads = model.config.num_attention_heads
    behind = (
        [layer.self_attn.o_proj for layer in model.model.layers]
        if causal
        else [layer.attention.output.dense for layer in model.encoder.layer]
    )
    ids = torch.randint(0, 60, (1, 50))
    own = own_attention_outputs(model, behind, ids, heads)
    q, k, v = capture_tensors(model, ids, [0, 2], is_causal=causal)
    assert k.shape[1] == (2 if causal else 4)
    attention = attnzoo.build("standard", heads=heads, head_dim=q.shape[3])
    torch.testing.assert_close(
        attention(q, k, v, is_causal=causal), torch.cat([own[0], own[2]]), rtol=1e-4, atol=1e-6
    )


def test_the_models_own_scale_is_folded_into_the_queries() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 60, (1, 20))
    plain, *_ = capture_tensors(model, ids, [0], is_causal=True)
    model.model.layers[0].self_attn.scaling *= 3
    scaled, *_ = capture_tensors(model, ids, [0], is_causal=True)
    torch.testing.assert_close(scaled, 3 * plain)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama()
    before = model.config._attn_implementation
    ids = torch.randint(0, 60, (1, 20))
    with torch.no_grad():
        wanted = model(ids).logits
    capture_tensors(model, ids, [1], is_causal=True)
    assert model.config._attn_implementation == before
    with pytest.raises(ValueError, match="no layer 3"):
        capture_tensors(model, ids, [3], is_causal=True)
    assert model.config._attn_implementation == before
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, wanted)


def test_attention_that_is_not_softmax_over_all_keys_is_refused() -> None:
    config = transformers.MistralConfig(
        **SIZES, num_attention_heads=6, num_key_value_heads=2, sliding_window=8
    )
    ids = torch.randint(0, 60, (1, 20))
    with pytest.raises(ValueError, match="sliding_window"):
        capture_tensors(transformers.MistralForCausalLM(config).eval(), ids, [0], is_causal=True)
    with pytest.raises(ValueError, match="is_causal=False"):
        capture_tensors(tiny_bert(), ids, [0], is_causal=True)


@pytest.mark.parametrize(
    ("heads", "kv_heads"),
    [
        ((0, 1, 3, 4), [0, 1]),
        ((0, 4), [0, 1]),
        ((2,), [0]),
        ((0, 1, 5), [0, 0, 1]),
        ((5, 0), [1, 0]),
    ],
)
def test_chosen_heads_keep_the_keys_they_share(heads: tuple[int, ...], kv_heads: list[int]) -> None:
    q, k, v = torch.randn(2, 6, 9, 4), torch.randn(2, 2, 9, 4), torch.randn(2, 2, 9, 4)
    chosen = select_heads(q, k, v, heads)
    assert torch.equal(chosen[1], k[:, kv_heads])
    whole = attnzoo.build("standard", heads=6, head_dim=4)(q, k, v)
    torch.testing.assert_close(
        attnzoo.build("standard", heads=len(heads), head_dim=4)(*chosen), whole[:, list(heads)]
    )


class Letters:
    """A tokenizer: one token a letter."""

    def __call__(self, text: str, *, truncation: bool, max_length: int, return_tensors: str) -> Any:
        ids = torch.tensor([[ord(letter) % 60 for letter in text[:max_length]]])
        return type("Encoding", (), {"input_ids": ids})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"length": 65}, "length=65 is not one that tiny can read; give 1 to 64"),
        ({"length": 40}, "the text has 30 tokens and length=40"),
        ({"length": 20, "layers": [3]}, "tiny has 3 layers, 0 to 2"),
        ({"length": 20, "heads": [0, 0]}, "must be distinct"),
        ({"length": 20, "heads": []}, "must be distinct indices"),
    ],
)
def test_what_the_model_does_not_have_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        capture(Pretrained("tiny", True, tiny_llama(), Letters()), "a" * 30, **arguments)


def test_a_sample_names_its_layers_and_heads() -> None:
    sample = capture(Pretrained("tiny", True, tiny_llama(), Letters()), "to be or not to be", 16)
    assert (sample.layers, sample.heads, sample.length) == (
        ("layer 0", "layer 1", "layer 2"),
        (0, 3, 5),
        16,
    )
    assert sample.q.shape == (3, 3, 16, 8) and sample.score_std > 0


def _real_sample(
    name: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Pretrained, Tensor]:
    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    try:
        pretrained, text = load(name), play()
    except MissingPackageError as error:
        pytest.skip(str(error))
    return pretrained, pretrained.encode(text, length)


def test_minilm_is_captured_as_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained, ids = _real_sample("MiniLM-L6", 128, monkeypatch)
    own = own_attention_outputs(
        pretrained.model,
        [layer.attention.output.dense for layer in pretrained.model.encoder.layer],
        ids,
        12,
    )
    q, k, v = capture_tensors(pretrained.model, ids, range(6), is_causal=False)
    torch.testing.assert_close(
        attnzoo.build("standard", heads=12, head_dim=32)(q, k, v),
        torch.cat(own),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.slow
def test_smollm2_is_captured_as_it_computes_and_predicts_the_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretrained, ids = _real_sample("SmolLM2-135M", 256, monkeypatch)
    own = own_attention_outputs(
        pretrained.model,
        [layer.self_attn.o_proj for layer in pretrained.model.model.layers],
        ids,
        9,
    )
    q, k, v = capture_tensors(pretrained.model, ids, range(30), is_causal=True)
    assert k.shape == (30, 3, 256, 64)
    torch.testing.assert_close(
        attnzoo.build("standard", heads=9, head_dim=64)(q, k, v, is_causal=True),
        torch.cat(own),
        rtol=1e-4,
        atol=1e-4,
    )
    with torch.no_grad():
        loss = float(pretrained.model(ids, labels=ids).loss)
    assert loss < 5  # weights that were read wrongly give ln 49152 = 10.8
