"""Attentions with gates in models that were made without: a swap adds what makes the gates of the
hidden states."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from swap_models import make
from torch import Tensor, nn

import attnzoo
from attnzoo import UnsupportedError
from attnzoo.integrations.swapping import record_of

#: A gate by head, one by channel, a rank-one removal, and levels of a tree.
NAMES = ("gated_deltanet", "kda", "rwkv7", "log_linear")
ALL = pytest.mark.parametrize("name", NAMES)


def model_of(name: Any, family: str = "llama", **options: Any) -> Any:
    model = make(family, num_hidden_layers=2, **options).double().eval()
    return attnzoo.swap(model, name)


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 50, shape, generator=torch.Generator().manual_seed(0))


def logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    return model(ids, use_cache=False, **kwargs).logits


@ALL
def test_gates_are_of_the_hidden_states_and_learn(name: str) -> None:
    """Of the layer's own, and all that makes them has a gradient."""
    model, ids = model_of(name), tokens(2, 11)
    layer: Any = model.model.layers[0].self_attn
    core, seen = layer.attention_core, {}
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(
            hidden=kwargs.get("hidden_states", args[0] if args else None)
        ),
        with_kwargs=True,
    )
    core.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs, q=args[0], k=args[1]), with_kwargs=True
    )
    logits(model, ids).sum().backward()
    assert seen["k"].shape == seen["q"].shape  # every query head has gates of its own
    # Of RWKV-7 a key is written by its rate, as it begins
    keys = seen["k"] / seen.get("removal_rate", 1)
    pairs = keys.unflatten(1, (2, 2))  # of the heads that shared a key
    torch.testing.assert_close(pairs[:, :, 0], pairs[:, :, 1], rtol=1e-12, atol=1e-12)
    assert not torch.equal(pairs[:, 0], pairs[:, 1])
    for one in core.spec.inputs:
        assert seen[one.name].shape[:3] == seen["q"].shape[:3]
        projection = core.input_projections[one.name]
        made = projection(keys if one.name == "removal_key" else seen["hidden"])
        if one.name == "removal_key":
            torch.testing.assert_close(made, seen[one.name], rtol=1e-12, atol=1e-12)
        if one.name in ("log_decay", "beta"):
            made = one.activation(made) if isinstance(projection, nn.Linear) else made
            heads = seen[one.name].transpose(1, 2).flatten(2)
            torch.testing.assert_close(made, heads, rtol=1e-12, atol=1e-12)
        grads = [x.grad for x in projection.parameters()]
        assert all(x is not None for x in grads)
        assert any(float(x.abs().max()) > 0 for x in grads if x is not None)


@ALL
def test_gradients_reach_the_layers_below(name: str) -> None:
    """Through the gates too: the slope along a direction is that of two runs beside each other. Of
    GPT-2, whose norms stay in float64."""
    model = model_of(name, "gpt2")
    x = torch.randn(1, 6, 32, dtype=torch.float64, requires_grad=True)
    along = torch.randn(1, 6, 32, dtype=torch.float64)

    def out(step: float) -> Tensor:
        return model(inputs_embeds=x + step * along, use_cache=False).logits.square().sum()

    (gradient,) = torch.autograd.grad(out(0.0), x)
    slope = (out(1e-5) - out(-1e-5)).detach() / 2e-5
    torch.testing.assert_close((gradient * along).sum(), slope, rtol=1e-6, atol=1e-8)


@ALL
def test_padding_is_absent_and_pieces_stay_apart(name: str) -> None:
    model, ids = model_of(name), tokens(1, 12)
    alone = logits(model, ids)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    found = logits(model, padded, attention_mask=mask, position_ids=places)[:, 3:]
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-10)
    packed = logits(model, ids, position_ids=torch.cat([torch.arange(7), torch.arange(5)])[None])
    apart = torch.cat([logits(model, ids[:, :7]), logits(model, ids[:, 7:])], 1)
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-10)


@ALL
def test_generation_needs_states(name: str) -> None:
    model, ids = model_of(name), tokens(1, 9)
    with pytest.raises(UnsupportedError, match=r"past_key_values=attnzoo\.state_cache\(model\)"):
        model.generate(ids, max_new_tokens=2, do_sample=False)
    found = model.generate(
        ids, max_new_tokens=3, do_sample=False, past_key_values=attnzoo.state_cache(model)
    )
    for _ in range(3):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids)


def test_saved_loaded_copied_and_taken_out(tmp_path: Path) -> None:
    model, ids = make("llama", num_hidden_layers=2).double().eval(), tokens(2, 8)
    before, keys = logits(model, ids), set(model.state_dict())
    attnzoo.swap(model, "gated_deltanet")
    with torch.no_grad():
        for attention in record_of(model).attentions.values():
            for parameter in attention.parameters():
                parameter.add_(0.1)
    trained = logits(model, ids)
    assert torch.equal(logits(copy.deepcopy(model), ids), trained)
    attnzoo.save(model, tmp_path / "gates.safetensors")
    attnzoo.unswap(model)
    assert set(model.state_dict()) == keys
    assert not model.model.layers[0].self_attn._forward_pre_hooks
    assert torch.equal(logits(model, ids), before)
    attnzoo.load(model, tmp_path / "gates.safetensors")
    assert torch.equal(logits(model, ids), trained)


@pytest.mark.thorough
def test_checkpointed_and_in_one_graph() -> None:
    model, ids = model_of("gated_deltanet"), tokens(2, 8)
    plain = logits(model, ids)
    graph: Any = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(graph, ids, attention_mask=torch.ones_like(ids)), plain)
    wanted = torch.autograd.grad(plain.sum(), list(model.parameters()), allow_unused=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    found = torch.autograd.grad(
        logits(model, ids).sum(), list(model.parameters()), allow_unused=True
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_hybrid_of_gates_and_exact_attention() -> None:
    model, ids = model_of({0: "gated_deltanet"}), tokens(1, 9)
    assert list(record_of(model).attentions) == [0]
    found = model.generate(
        ids, max_new_tokens=3, do_sample=False, past_key_values=attnzoo.state_cache(model)
    )
    for _ in range(3):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids)


def test_torchs_own_layers() -> None:
    """A swapped nn.MultiheadAttention projects its gates as `attnzoo.MultiheadAttention` does."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    attnzoo.swap(model, "gated_deltanet")
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    model(
        x, is_causal=True, mask=nn.Transformer.generate_square_subsequent_mask(7)
    ).sum().backward()
    for attention in record_of(model).attentions.values():
        assert all(x.grad is not None for x in attention.parameters())


def test_what_reads_both_ways_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="causal"):
        model_of("gated_deltanet", "bert")
