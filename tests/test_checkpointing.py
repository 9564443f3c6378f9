"""Gradient checkpointing, torch's and Hugging Face's: the forward runs twice, and no gradient
changes by a bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import Case, usual_cases
from multihead_cases import options_of
from small import in_models, layer_masks, small
from stages import in_turn, staged
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import attnzoo
from attnzoo import Attention, MultiheadAttention
from attnzoo.registry import spec_of

TWO_WAYS = pytest.mark.parametrize(("case", "use_reentrant"), in_turn(usual_cases(), [False, True]))
FAMILIES = ["bert", "gpt2", "llama", "mistral", "qwen2"]


def count_calls(model: nn.Module) -> list[int]:
    """A list that grows by one with every forward of an attention of the zoo."""
    calls: list[int] = []
    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def gradients(model: nn.Module, x: Tensor, run: Callable[[], Tensor]) -> list[Tensor]:
    """By `backward`, which is all that reentrant checkpointing knows; every output weighs
    differently."""
    model.zero_grad()
    x.grad = None
    torch.manual_seed(1)  # of the dropout
    out = run()
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [parameter.grad for parameter in (x, *model.parameters()) if parameter.grad is not None]


@TWO_WAYS
def test_checkpointing_a_multihead_attention(case: Case, use_reentrant: bool) -> None:
    length = 60 if case.spec.needs_max_length else 150
    mha = MultiheadAttention(32, 4, batch_first=True, **options_of(case))
    x = torch.randn(2, length, 32, requires_grad=True)
    padding = torch.zeros(2, length, dtype=torch.bool)
    padding[1, :20] = True

    def attend(x: Tensor) -> Tensor:
        return mha(
            x, x, x, key_padding_mask=padding, is_causal=case.spec.causal, need_weights=False
        )[0]

    calls = count_calls(mha)
    plain = gradients(mha, x, lambda: attend(x))
    assert len(calls) == 1
    again = gradients(mha, x, lambda: checkpoint(attend, x, use_reentrant=use_reentrant))
    assert len(calls) == 3
    assert len(plain) >= 5 and all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


@TWO_WAYS
def test_checkpointing_torchs_layer(case: Case, use_reentrant: bool) -> None:
    """Dropout inside the layer draws the same numbers in the second forward."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.2)
    layer.self_attn.dropout = 0.2 if case.spec.dropout else 0.0
    options = {
        key: value
        for key, value in options_of(case)["attention_options"].items()
        if key != "dropout"
    }
    attnzoo.swap(layer, case.variant, **options)
    x = torch.randn(2, 60, 32, requires_grad=True)
    masks = layer_masks(case.spec, 60)

    def run(x: Tensor) -> Tensor:
        return layer(x, **masks)

    plain = gradients(layer, x, lambda: run(x))
    again = gradients(layer, x, lambda: checkpoint(run, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    torch.manual_seed(2)
    assert not torch.equal(run(x), run(x))


@pytest.mark.parametrize(
    ("family", "name", "use_reentrant"),
    [
        staged(family, name, bool((i + j) % 2), first=(i + j) % len(FAMILIES) == 0)
        for i, family in enumerate(FAMILIES)
        for j, name in enumerate(in_models())
        if spec_of(name).runs(family != "bert")
    ],
)
def test_checkpointing_a_transformers_model(family: str, name: str, use_reentrant: bool) -> None:
    pytest.importorskip("transformers")
    from swap_models import make, padded, tokens

    model, ids, mask = (
        attnzoo.swap(make(family), name, **small(name)).train(),
        tokens(),
        padded("left"),
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()

    def run() -> Tensor:
        return model(inputs_embeds=embedded, attention_mask=mask, use_cache=False)[0][mask.bool()]

    calls = count_calls(model)
    plain = gradients(model, embedded, run)
    assert len(calls) == 3
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    again = gradients(model, embedded, run)
    assert len(calls) == 9
    assert len(plain) > 20 and all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
