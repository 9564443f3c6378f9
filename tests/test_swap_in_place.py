"""A swapped module stays the object that it is: what hangs on it is there in the swap and after it,
or unswap says what is in the way."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small import layer_masks, small
from stages import in_turn
from swap_models import make, tokens
from test_swap_modules import ROUNDING, TimmAttentionLike, encoder, vision
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import attnzoo
from attnzoo import UnsupportedError

X = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(1))
MODELS: dict[str, tuple[Any, str]] = {
    "torch": (encoder, "layers.0.self_attn"),
    "timm": (vision, "0"),
}


def model_and_attention(kind: str) -> tuple[nn.Module, Any]:
    make_it, path = MODELS[kind]
    model = make_it()
    return model, model.get_submodule(path)


def run(model: nn.Module, kind: str) -> Tensor:
    return model(tokens()).logits if kind == "llama" else model(X)


def with_every_hook(module: nn.Module, heard: list[str]) -> None:
    """A hook of each kind that a module has."""
    module.register_forward_pre_hook(lambda *_: heard.append("before"))
    module.register_forward_hook(lambda *_: heard.append("after"))
    module.register_full_backward_pre_hook(lambda *_: heard.append("before backward"))
    module.register_full_backward_hook(lambda *_: heard.append("after backward"))
    module.register_state_dict_pre_hook(lambda *_: heard.append("before state"))
    module.register_state_dict_post_hook(lambda *_: heard.append("after state"))
    module.register_load_state_dict_pre_hook(lambda *_: heard.append("before load"))
    module.register_load_state_dict_post_hook(lambda *_: heard.append("after load"))


HEARD = {
    "before",
    "after",
    "before backward",
    "after backward",
    "before state",
    "after state",
    "before load",
    "after load",
}


@pytest.mark.parametrize(("name", "kind"), in_turn(attnzoo.names(), ["torch", "timm", "llama"]))
def test_hooks_and_attributes_stay(kind: str, name: str) -> None:
    spec = attnzoo.describe(name).spec
    if kind == "llama":
        model = make("llama")
        module: Any = model.model.layers[0].self_attn
    else:
        model, module = model_and_attention(kind)
    if not (spec.causal if kind == "llama" else spec.bidirectional or kind == "torch"):
        with pytest.raises(UnsupportedError):
            attnzoo.swap(model, name, **small(name))
        return
    masks: dict[str, Any] = {}
    if kind == "torch":
        masks = {key.removeprefix("src_"): mask for key, mask in layer_masks(spec, 10).items()}
    heard: list[str] = []
    with_every_hook(module, heard)
    module.mine = {"a": 1}
    own = {key for key in vars(module) if not key.startswith("_")}
    attnzoo.swap(model, name, **small(name))
    for _ in range(2):
        heard.clear()
        out = model(tokens()).logits if kind == "llama" else model(X, **masks)
        out.sum().backward()
        model.load_state_dict(model.state_dict())
        assert set(heard) == HEARD and heard.count("after") == 1
        assert module.mine == {"a": 1} and own <= vars(module).keys()
        if hasattr(model, "_attnzoo_swap"):
            attnzoo.unswap(model)
            masks = {} if spec.bidirectional else masks
    assert {key for key in vars(module) if not key.startswith("_")} == own


@pytest.mark.parametrize("kind", MODELS)
def test_the_swap_itself_is_heard_by_no_hook(kind: str) -> None:
    model, _ = model_and_attention(kind)
    heard: list[str] = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: heard.append("after"))
        module.register_forward_pre_hook(lambda *_: heard.append("before"))
    attnzoo.unswap(attnzoo.swap(model, "linear"))
    assert not heard


class OfMyOwn(TimmAttentionLike):
    """With a method, a property and a class attribute."""

    kind = "mine"

    def __init__(self) -> None:
        super().__init__()
        self.note = "here"

    @property
    def twice(self) -> int:
        return 2 * self.num_heads

    def parts(self) -> list[str]:
        return sorted(self._modules)


class MyMultiheadAttention(nn.MultiheadAttention):
    kind = "mine"

    @property
    def twice(self) -> int:
        return 2 * self.num_heads

    def parts(self) -> list[str]:
        return sorted(self._modules)


@pytest.mark.parametrize("kind", MODELS)
def test_a_class_of_the_users_own_stays_one(kind: str) -> None:
    if kind == "timm":
        model: nn.Module = nn.Sequential(OfMyOwn(), nn.LayerNorm(32))
        module: Any = model.get_submodule("0")
    else:
        model, module = encoder(), MyMultiheadAttention(32, 4, batch_first=True)
        model.get_submodule("layers.0").self_attn = module
    model.eval()
    own, exact, before = type(module), run(model, kind), module.parts()
    attnzoo.swap(model, "linear")
    swapped, given = run(model, kind), type(module)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found: Any = twin.get_submodule(MODELS[kind][1])
        assert (
            isinstance(found, own)
            and found.kind == "mine"
            and found.twice == 8
            and found.parts() == sorted([*before, "attention"])
        )
        assert torch.equal(run(twin, kind), swapped) and type(found) is given
        attnzoo.unswap(twin)
        assert (
            torch.equal(run(twin, kind), exact) and type(found) is own and found.parts() == before
        )


class Doubling(nn.Module):
    """An adapter around a layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.in_features, self.out_features = inner.in_features, inner.out_features

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


def test_what_came_into_timms_attention_stays() -> None:
    for change in (
        lambda module: setattr(module, "proj", Doubling(module.proj)),
        lambda module: setattr(module, "qkv", nn.Sequential(module.qkv, nn.Tanh())),
        lambda module: parametrize.register_parametrization(module.qkv, "weight", nn.Tanh()),
        lambda module: parametrizations.weight_norm(module.proj),
        lambda module: prune.random_unstructured(module.qkv, "weight", 0.5),
        lambda module: module.proj.register_forward_hook(lambda _, args, out: 3 * out),
        lambda module: module.register_forward_hook(lambda _, args, out: 3 * out),
        lambda module: setattr(module, "q_norm", nn.Identity()),
    ):
        model, module = model_and_attention("timm")
        exact = model(X)
        attnzoo.swap(model, "standard")
        change(module)
        changed = model(X)
        attnzoo.unswap(model)
        torch.testing.assert_close(model(X), changed, **ROUNDING)
        assert model.get_submodule("0") is module and not isinstance(module, attnzoo.Attention)
    assert not torch.allclose(changed, exact, atol=1e-3)


def test_what_torchs_own_forward_honours_stays() -> None:
    for change in (
        lambda module: parametrize.register_parametrization(module.out_proj, "weight", nn.Tanh()),
        lambda module: prune.random_unstructured(module, "in_proj_weight", 0.5),
        lambda module: module.register_forward_hook(lambda _, args, out: (3 * out[0], None)),
        lambda module: setattr(module, "out_proj", nn.Linear(32, 32)),
    ):
        model, module = model_and_attention("torch")
        attnzoo.swap(model, "standard")
        change(module)
        changed = model(X)
        attnzoo.unswap(model)
        torch.testing.assert_close(model(X), changed, **ROUNDING)
    model, module = model_and_attention("torch")
    attnzoo.swap(model, "standard")
    layer: Any = model.get_submodule("layers.1")
    layer.linear1 = Doubling(layer.linear1)
    changed = model(X)
    with torch.no_grad():
        attnzoo.unswap(model)
        # Torch's fast path would read the weight beneath.
        torch.testing.assert_close(model(X), changed, **ROUNDING)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda module: setattr(module, "out_proj", Doubling(module.out_proj)),
            r"layers\.0\.self_attn\.out_proj is a .*Doubling that is called",
        ),
        (
            lambda module: module.out_proj.register_forward_hook(lambda *_: None),
            "out_proj is a .* that is called.*hooks: remove them",
        ),
        (
            lambda module: setattr(module.out_proj, "forward", lambda x: x),
            "out_proj is a .* that is called",
        ),
        (
            lambda module: parametrize.register_parametrization(
                module, "in_proj_weight", nn.Tanh()
            ),
            "is a ParametrizedSwappedAttention now",
        ),
        (
            lambda module: setattr(module, "forward", lambda *_, **__: None),
            "was given a forward of its own since the swap",
        ),
    ],
)
def test_what_torchs_own_forward_would_pass_by_is_in_the_way(change: Any, sentence: str) -> None:
    model, module = model_and_attention("torch")
    attnzoo.swap(model, "linear")
    change(module)
    with pytest.raises(ValueError, match=sentence):
        attnzoo.unswap(model)
    assert all(isinstance(layer.self_attn, attnzoo.MultiheadAttention) for layer in model.layers)  # pyright: ignore[reportGeneralTypeIssues]


@pytest.mark.parametrize("kind", [*MODELS, "llama"])
def test_what_would_go_with_the_attention_is_in_the_way(kind: str, tmp_path: Path) -> None:
    """The attention, or a part of it, wrapped or replaced; the module itself gone."""
    path, core = (
        ("model.layers.0.self_attn", "attention_core")
        if kind == "llama"
        else (MODELS[kind][1], "attention")
    )

    def swapped() -> tuple[nn.Module, nn.Module]:
        model = make("llama") if kind == "llama" else model_and_attention(kind)[0]
        attnzoo.swap(model, "linear")
        return model, model.get_submodule(path)

    model, module = swapped()
    attention = getattr(module, core)
    setattr(module, core, nn.Sequential(attention))
    with pytest.raises(
        ValueError,
        match=rf"layer 0 \({path}\): [\w. ]+ of its linear was replaced, wrapped or taken out",
    ):
        attnzoo.unswap(model)
    with pytest.raises(
        ValueError,
        match=rf"layer 0 \({path}\): its attention was replaced or wrapped since the "
        rf"swap, in a Sequential",
    ):
        attnzoo.save(model, tmp_path / "swap.safetensors")
    setattr(module, core, attention)
    attention.engine.adapter = nn.Linear(2, 2)
    with pytest.raises(
        ValueError,
        match=rf"layer 0 \({path}\): engine.adapter of its linear was replaced, wrapped "
        rf"or taken out since the swap",
    ):
        attnzoo.unswap(model)
    del attention.engine.adapter
    parent, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    setattr(parent, name, nn.Identity())
    with pytest.raises(
        ValueError,
        match=rf"layer 0 \({path}\): the \w+ that was swapped is not in this \w+ any more",
    ):
        attnzoo.unswap(model)
    setattr(parent, name, nn.Sequential(module))  # wrapped, it is still there
    attnzoo.unswap(model)
    assert core not in module._modules


@pytest.mark.parametrize("kind", MODELS)
def test_names_that_a_swap_takes_are_not_the_users(kind: str) -> None:
    model, module = model_and_attention(kind)
    module.attention = "mine"
    with pytest.raises(
        UnsupportedError,
        match=r"layer 0 .*has an attribute 'attention', the name of what a swap adds; rename it",
    ):
        attnzoo.swap(model, "linear")
    del module.attention
    module.forward = partial(module.forward)
    with pytest.raises(UnsupportedError, match="a forward of its own"):
        attnzoo.swap(model, "linear")
    del module.forward
    attnzoo.swap(model, "linear")
