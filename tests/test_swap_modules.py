"""attnzoo.swap on models of nn.MultiheadAttention and of timm's Attention."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small import cannot, small
from torch import Tensor, nn
from torch.nn.utils.prune import random_unstructured

import attnzoo
from attnzoo import UnsupportedError

ROUNDING: Any = {"rtol": 0.0, "atol": 5e-6}


def encoder(dropout: float = 0.0) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


class TimmAttentionLike(nn.Module):
    """The parts and the arithmetic of timm's Attention, written from its documentation of
    shapes."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = 4, 8, 8**-0.5
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.q_norm, self.k_norm = nn.LayerNorm(8), nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(dropout), nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4)
        scores = self.q_norm(q) @ self.k_norm(k).mT * self.scale
        out = self.attn_drop(scores.softmax(-1)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, length, 32)))


class Biased(TimmAttentionLike):
    def __init__(self) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 4))


class Squared(TimmAttentionLike):
    """The parts of timm's Attention, another formula."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return super().forward(x, attn_mask).square()


class OfImages(TimmAttentionLike):
    """As in models whose tokens keep the shape of the image."""

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        return super().forward(x.flatten(1, 2)).view(batch, height, width, 32)


def vision(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        TimmAttentionLike(dropout), nn.LayerNorm(32), TimmAttentionLike(dropout)
    ).eval()


@pytest.mark.parametrize("make", [encoder, vision])
def test_standard_is_the_models_own(make: Any) -> None:
    model, x = make(), torch.randn(2, 10, 32)
    keys, exact = list(model.state_dict()), model(x)
    attnzoo.swap(model, "standard")
    cores = [module for module in model.modules() if isinstance(module, attnzoo.Attention)]
    torch.testing.assert_close(model(x), exact, **ROUNDING)
    assert [core.last_backend for core in cores] == ["sdpa", "sdpa"] and list(
        model.state_dict()
    ) == keys


@pytest.mark.parametrize("make", [encoder, vision])
def test_unswap_is_bit_for_bit_and_keeps_training(make: Any) -> None:
    model, x = make(), torch.randn(2, 10, 32)
    exact, keys, kinds = (
        model(x),
        list(model.state_dict()),
        [type(module) for module in model.modules()],
    )
    attnzoo.swap(model, "performer", num_features=16)
    assert not torch.allclose(model(x), exact, atol=1e-3)
    copied = attnzoo.unswap(copy.deepcopy(model))
    assert torch.equal(copied(x), exact) and not torch.allclose(model(x), exact, atol=1e-3)
    attnzoo.unswap(model)
    assert (
        torch.equal(model(x), exact)
        and list(model.state_dict()) == keys
        and [type(module) for module in model.modules()] == kinds
    )
    attnzoo.swap(model, "linear").train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model(x).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    attnzoo.unswap(model.double())
    changed = [
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter.float(), before[name])
    ]
    assert any("in_proj_weight" in name or "qkv.weight" in name for name in changed)
    assert model(x.double()).dtype == torch.float64 and model.training


def test_padding_in_an_encoder_that_would_nest() -> None:
    model, x = encoder(), torch.randn(2, 10, 32)
    ignore = torch.zeros(2, 10, dtype=torch.bool)
    ignore[1, 6:] = True
    with torch.no_grad():
        exact = model(x, src_key_padding_mask=ignore)
        attnzoo.swap(model, "standard")
        assert not model.use_nested_tensor
        torch.testing.assert_close(
            model(x, src_key_padding_mask=ignore)[~ignore], exact[~ignore], **ROUNDING
        )
        attnzoo.unswap(model)
        assert model.use_nested_tensor and torch.equal(model(x, src_key_padding_mask=ignore), exact)


def test_a_decoder_keeps_its_cross_attention() -> None:
    torch.manual_seed(0)
    model: Any = nn.TransformerDecoder(
        nn.TransformerDecoderLayer(32, 4, 48, 0.0, batch_first=True), 2
    ).eval()
    x, memory, mask = (
        torch.randn(2, 10, 32),
        torch.randn(2, 7, 32),
        nn.Transformer.generate_square_subsequent_mask(10),
    )
    exact = model(x, memory, tgt_mask=mask, tgt_is_causal=True)
    attnzoo.swap(model, "sliding_window", window=10)
    assert [type(layer.multihead_attn) for layer in model.layers] == [nn.MultiheadAttention] * 2
    torch.testing.assert_close(
        model(x, memory, tgt_mask=mask, tgt_is_causal=True), exact, **ROUNDING
    )
    attnzoo.swap(attnzoo.unswap(model), "linformer", max_length=16, rank=4)
    for options in ({"tgt_mask": mask, "tgt_is_causal": True}, {"tgt_mask": mask}):
        with pytest.raises(
            UnsupportedError,
            match=r"layer 0 \(layers\.0\.self_attn\): linformer cannot be causal; use standard or",
        ):
            model(x, memory, **options)
    assert model(x, memory).shape == x.shape  # a decoder that is not causal, as torch lets it be


@pytest.mark.parametrize(
    "name", [name for name in attnzoo.names() if not attnzoo.describe(name).spec.bidirectional]
)
def test_an_attention_of_images_that_is_causal_only(name: str) -> None:
    model, x = vision(), torch.randn(2, 10, 32)
    exact = model(x)
    with pytest.raises(UnsupportedError, match=rf"layer 0 \(0\): {cannot(name, False)}"):
        attnzoo.swap(model, name, **small(name))
    assert torch.equal(model(x), exact)


def test_a_module_in_two_places_is_swapped_in_both() -> None:
    """And stays the object that it is."""
    shared, x = TimmAttentionLike(), torch.randn(2, 10, 32)
    model, exact = nn.Sequential(shared, shared), shared(x)
    attnzoo.swap(model, "linear")
    assert model[0] is model[1] is shared and not torch.allclose(shared(x), exact, atol=1e-3)
    assert attnzoo.unswap(model)[0] is model[1] is shared and torch.equal(shared(x), exact)


@pytest.mark.parametrize("make", [encoder, vision])
def test_dropout_that_a_variant_never_forms_is_for_evaluation(make: Any) -> None:
    """Torch's layers have it by default: refused where it would act, told of where it does not."""
    model, x, sentence = (
        make(dropout=0.1),
        torch.randn(2, 10, 32),
        "with probability 0.1 while training, which linear never forms",
    )
    keys = list(model.state_dict())
    with pytest.raises(UnsupportedError, match=sentence):
        attnzoo.swap(model.train(), "linear")
    assert list(model.state_dict()) == keys and not any(
        isinstance(module, attnzoo.Attention) for module in model.modules()
    )
    with pytest.warns(UserWarning, match=sentence):
        attnzoo.swap(model.eval(), "linear")
    wanted = attnzoo.swap(make(), "linear")
    torch.testing.assert_close(model(x), wanted(x), rtol=0.0, atol=0.0)
    with pytest.raises(UnsupportedError, match=r"0\.1 drops entries|probability 0\.1"):
        model.train()(x)


@pytest.mark.parametrize("make", [encoder, vision])
def test_a_model_with_a_part_that_is_swapped_already(make: Any) -> None:
    model = make()
    part: Any = next(
        module for path, module in model.named_modules() if path and not path.endswith("layers")
    )
    if make is vision:
        model = nn.Sequential(part := nn.Sequential(part), TimmAttentionLike())
    attnzoo.swap(part, "linear")
    with pytest.raises(ValueError, match=r"(layers\.)?0 of this \w+ is swapped already"):
        attnzoo.swap(model, "standard")
    attnzoo.unswap(part)
    attnzoo.swap(model, "standard")
    with pytest.raises(ValueError, match="has attnzoo's attention in it already: unswap"):
        attnzoo.swap(part, "linear")


class Doubled(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        out, weights = super().forward(*args, **kwargs)
        return 2 * out, weights


def test_a_kind_of_multihead_attention_that_does_more() -> None:
    plain, x = nn.MultiheadAttention(32, 4), torch.randn(10, 2, 32)
    with pytest.raises(
        UnsupportedError,
        match="1 is a Doubled with a forward of its own, which a swapped attention would drop",
    ):
        attnzoo.swap(nn.Sequential(plain, Doubled(32, 4)), "linear")
    pruned = nn.MultiheadAttention(32, 4)
    random_unstructured(pruned, "in_proj_weight", 0.5)
    with pytest.raises(
        UnsupportedError,
        match="1 is a MultiheadAttention with in_proj_weight_orig and in_proj_weight_mask",
    ):
        attnzoo.swap(nn.Sequential(plain, pruned), "linear")
    named = nn.Sequential(type("Named", (nn.MultiheadAttention,), {})(32, 4))
    exact = named[0](x, x, x)[0]
    torch.testing.assert_close(
        attnzoo.swap(named, "standard", layers="0")[0](x, x, x)[0], exact, **ROUNDING
    )
    assert isinstance(named[0], attnzoo.MultiheadAttention)


def test_models_of_several_kinds_are_swapped_part_by_part() -> None:
    """Else one of the kinds would stay exact and nobody be told."""
    both = nn.ModuleDict({"text": encoder(), "image": vision()})
    with pytest.raises(
        ValueError,
        match=r"ModuleDict has nn\.MultiheadAttention and timm's Attention; swap its "
        r"parts one by one",
    ):
        attnzoo.swap(both, "linear")
    assert not any(isinstance(module, attnzoo.Attention) for module in both.modules())
    for part in both.values():
        attnzoo.swap(part, "linear")
    with pytest.raises(
        ValueError,
        match="TimmAttentionLike cannot be swapped in place; swap the model or the block",
    ):
        attnzoo.swap(TimmAttentionLike(), "linear")


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"model='bert' is no torch\.nn\.Module; give the model itself"
    ):
        attnzoo.swap("bert", "linear")  # pyright: ignore[reportArgumentType]


def test_what_would_be_dropped_is_refused() -> None:
    with pytest.raises(
        UnsupportedError, match=r"layer 0 \(0\): Biased has relative_position_bias_table"
    ):
        attnzoo.swap(nn.Sequential(Biased()), "standard")
    with pytest.raises(
        UnsupportedError,
        match=r"layer 1 \(1\): Squared has the parts of softmax attention and another formula",
    ):
        attnzoo.swap(nn.Sequential(TimmAttentionLike(), Squared()), "standard")
    with pytest.raises(
        UnsupportedError,
        match=r"layer 0 \(0\): OfImages does not take \(batch, length, features\) alone",
    ):
        attnzoo.swap(nn.Sequential(OfImages()), "linear")
    with pytest.raises(ValueError, match="cannot be swapped in place"):
        attnzoo.swap(nn.MultiheadAttention(32, 4), "standard")
    with pytest.raises(ValueError, match="2 attention layers, 0 to 1"):
        attnzoo.swap(encoder(), "standard", layers=2)


def test_an_encoder_of_two_kinds() -> None:
    model: Any = attnzoo.swap(encoder(), {0: ("sliding_window", {"window": 2}), 1: "linear"})
    assert [layer.self_attn.attention.spec.name for layer in model.layers] == [
        "sliding_window",
        "linear",
    ]


class Wrapper(nn.Module):
    """Hands on the attributes that it does not have, as PEFT's models do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


@pytest.mark.parametrize(
    "wrap",
    [Wrapper, lambda model: torch.compile(model, backend="eager")],
    ids=["handing on", "compiled"],
)
def test_a_wrapper_takes_back_what_was_swapped_in_it(wrap: Any, tmp_path: Path) -> None:
    model, x = encoder(), torch.randn(2, 10, 32)
    exact = model(x)
    attnzoo.swap(model, "linear")
    attnzoo.save(wrap(model), tmp_path / "swap.safetensors")
    attnzoo.unswap(wrap(model))
    assert torch.equal(model(x), exact)
    assert torch.equal(attnzoo.unswap(attnzoo.load(model, tmp_path / "swap.safetensors"))(x), exact)
    wrapped = attnzoo.swap(wrap(model), "linear")
    assert not torch.equal(model(x), exact)
    attnzoo.unswap(wrapped)
    assert torch.equal(model(x), exact)
    attnzoo.unswap(attnzoo.swap(wrap(model), "linear"))
