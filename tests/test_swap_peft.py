"""PEFT's adapters on swapped models: they are taken, they learn, and they are there after unswap or
unswap says that they are in the way."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small import in_models, layer_masks, small
from swap_models import answer, make, tokens
from test_swap_modules import encoder, vision
from torch import Tensor, nn

import attnzoo
from attnzoo.integrations.healing.imitation import attention_parameters, recorded_calls

peft = pytest.importorskip("peft")
NAMES = in_models()
X = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
# Trained numbers are of any size.
ROUNDING: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
OUT = (
    r"layers\.0\.self_attn\.out_proj is a peft\..*Linear that is called.*in PEFT by "
    r"merge_and_unload"
)


def adapted(model: nn.Module, targets: Any) -> Any:
    """With adapters that do something from the start."""
    torch.manual_seed(5)
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False)
    ).eval()


def trained(model: Any, **masks: Any) -> Any:
    """After a step in which every adapter moves."""
    adapters = {path: weight for path, weight in model.named_parameters() if "lora_" in path}
    before = {path: weight.detach().clone() for path, weight in adapters.items()}
    loss = model.train()(X, **masks).square().mean()
    loss.backward()
    torch.optim.SGD(adapters.values(), 0.5).step()
    still = [
        path
        for path, weight in model.named_parameters()
        if "lora_" in path and torch.equal(weight, before[path])
    ]
    assert adapters and not still
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_the_layer_of_torchs_is_adapted_whole(name: str) -> None:
    """PEFT's layer around nn.MultiheadAttention, which reads its weights: what the exact core
    answers is what torch's own would."""
    spec = attnzoo.describe(name).spec
    masks: dict[str, Any] = {
        key.removeprefix("src_"): mask for key, mask in layer_masks(spec, 10).items()
    }
    model = trained(
        adapted(attnzoo.swap(encoder().double(), name, **small(name)), ["self_attn"]), **masks
    )
    swapped = model(X, **masks)
    with torch.no_grad():
        # Beside torch's fast path.
        torch.testing.assert_close(model(X, **masks), swapped, **ROUNDING)
    exact = adapted(encoder().double(), ["self_attn"])
    exact.load_state_dict(
        {key: value for key, value in model.state_dict().items() if ".attention." not in key}
    )
    wanted = exact.train()(X, **masks)  # in evaluation torch's fast path passes the adapters by
    if spec.family == "exact":
        torch.testing.assert_close(swapped, wanted, **ROUNDING)
    attnzoo.unswap(model)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(X, **masks), wanted, **ROUNDING)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(X, **masks), wanted, **ROUNDING)
    assert isinstance(merged.layers[0].self_attn, nn.MultiheadAttention)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_that_torch_would_pass_by_are_in_the_way(name: str) -> None:
    spec = attnzoo.describe(name).spec
    masks: dict[str, Any] = {
        key.removeprefix("src_"): mask for key, mask in layer_masks(spec, 10).items()
    }
    model = adapted(attnzoo.swap(encoder().double(), name, **small(name)), ["out_proj", "linear1"])
    model = trained(model, **masks)
    swapped = model(X, **masks)
    with pytest.raises(ValueError, match=OUT):
        attnzoo.unswap(model)
    assert torch.equal(model(X, **masks), swapped)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(X, **masks), swapped, **ROUNDING)
    attnzoo.unswap(merged)
    if spec.family == "exact":
        torch.testing.assert_close(merged(X, **masks), swapped, **ROUNDING)


def test_all_linear_layers_of_torchs() -> None:
    for name in ("standard", "longformer"):  # with a projection of its own
        model = adapted(attnzoo.swap(encoder().double(), name), "all-linear")
        with pytest.raises(ValueError, match=OUT):
            attnzoo.unswap(model)
        attnzoo.unswap(model.merge_and_unload())


def test_adapters_beside_the_attention_stay_alive() -> None:
    model = adapted(attnzoo.swap(encoder().double(), "standard"), ["linear1", "linear2"])
    swapped = model(X)
    attnzoo.unswap(model)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(X), swapped, **ROUNDING)


@pytest.mark.parametrize("targets", ["all-linear", ["qkv"], ["proj", "qkv"]], ids=str)
def test_adapters_in_timms_attention_stay(targets: Any) -> None:
    for before in (False, True):
        model = vision().double()
        model = (
            attnzoo.swap(adapted(model, targets), "standard")
            if before
            else adapted(attnzoo.swap(model, "standard"), targets)
        )
        swapped = trained(model)(X)
        attnzoo.unswap(model)
        torch.testing.assert_close(model(X), swapped, **ROUNDING)
        assert any("lora_" in path for path, _ in model.named_parameters())
        attnzoo.unswap(attnzoo.swap(model, "linear"))


def test_adapters_of_a_language_model_and_every_entry(tmp_path: Path) -> None:
    given: dict[str, Tensor] = {"attention_mask": torch.ones(2, 24)}
    for before in (False, True):
        model = make("llama")
        model = (
            attnzoo.swap(adapted(model, "all-linear"), "linear")
            if before
            else adapted(attnzoo.swap(model, "linear"), "all-linear")
        )
        swapped = answer(model, tokens(), **given)
        assert any("lora_" in path for path in attention_parameters(model))
        with recorded_calls(model) as calls:
            model(tokens(), use_cache=False, **given)
        assert len(calls) == 3
        settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "input_ids": tokens()}
        wanted = model.generate(**settings, use_cache=False)
        assert torch.equal(
            model.generate(**settings, past_key_values=attnzoo.state_cache(model)), wanted
        )
        attnzoo.save(model, tmp_path / "swap.safetensors")
        attnzoo.unswap(model)
        exact = answer(adapted(make("llama"), "all-linear"), tokens(), **given)
        torch.testing.assert_close(answer(model, tokens(), **given), exact, rtol=0.0, atol=5e-6)
        torch.testing.assert_close(
            answer(attnzoo.load(model, tmp_path / "swap.safetensors"), tokens(), **given),
            swapped,
            rtol=0.0,
            atol=5e-6,
        )


def test_a_shared_projection_is_none_of_three() -> None:
    layer = attnzoo.MultiheadAttention(
        32, 4, attention="reformer", attention_options={"share_qk": True}
    )
    with pytest.raises(ValueError, match="Only same embed for query/key/value"):
        adapted(nn.ModuleDict({"attn": layer}), ["attn"])


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_what_an_attention_learns_is_trained_beside_adapters(kind: str, tmp_path: Path) -> None:
    """PEFT trains a copy (modules_to_save): it is what is saved, what decodes, and what
    merge_and_unload leaves."""
    name: str
    options: dict[str, Any]
    name, options = (
        ("sliding_window", {"window": 4, "sink_logits": True})
        if kind == "llama"
        else ("linformer", {"max_length": 32, "rank": 4})
    )
    torch.manual_seed(3)
    model = attnzoo.swap(make(kind), name, **options)
    config = peft.LoraConfig(
        target_modules=["q_proj" if kind == "llama" else "query"],
        modules_to_save=["attention_core"],
    )
    model: Any = peft.get_peft_model(model, config).eval()
    answer(model, tokens()).square().sum().backward()
    learned = [
        weight
        for path, weight in model.named_parameters()
        if "attention_core" in path and weight.grad is not None
    ]
    assert len(learned) >= 3
    torch.optim.SGD(learned, 1.0).step()
    wanted = answer(model, tokens())
    attnzoo.save(model, tmp_path / "swap.safetensors")
    torch.testing.assert_close(
        answer(attnzoo.load(make(kind), tmp_path / "swap.safetensors"), tokens()),
        wanted,
        rtol=0.0,
        atol=5e-6,
    )
    if kind == "llama":
        settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "input_ids": tokens()}
        uncached = model.generate(**settings, use_cache=False)
        assert torch.equal(
            model.generate(**settings, past_key_values=attnzoo.state_cache(model)), uncached
        )
    with pytest.raises(
        ValueError,
        match=rf"of its {name} was replaced, wrapped or taken out since the swap .*in "
        rf"PEFT by merge_and_unload",
    ):
        attnzoo.unswap(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(answer(merged, tokens()), wanted, rtol=0.0, atol=5e-6)
    attnzoo.unswap(merged)
    assert torch.equal(answer(merged, tokens()), answer(make(kind), tokens()))


GATED = {"torch": ["self_attn.attention"], "llama": ["attention_core"]}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("torch", "gated_deltanet"),
        ("torch", "mamba2"),
        ("torch", "longformer"),
        ("llama", "gated_deltanet"),
        ("llama", "mamba2"),
    ],
)
def test_what_makes_the_inputs_of_an_attention_is_trained_beside_adapters(
    kind: str, name: str
) -> None:
    """In the copy that PEFT trains, gates and the projections of global rows are found where PEFT
    has put them: without them the attention would run as another one."""
    torch.manual_seed(3)
    model: nn.Module = encoder().double() if kind == "torch" else make("llama")
    options: dict[str, Any] = {"window": 4, "global_tokens": 1} if name == "longformer" else {}
    attnzoo.swap(model, name, **options)
    masks: dict[str, Any] = {}
    if kind == "torch" and name != "longformer":
        masks = {"mask": nn.Transformer.generate_square_subsequent_mask(10).double()}
        masks["is_causal"] = True
    run = partial(model, X, **masks) if kind == "torch" else partial(answer, model, tokens())
    wanted = run()
    targets = ["linear1"] if kind == "torch" else ["q_proj"]
    config = peft.LoraConfig(target_modules=targets, r=2, modules_to_save=GATED[kind])
    adapted: Any = peft.get_peft_model(model, config).eval()
    found = adapted(X, **masks) if kind == "torch" else answer(adapted, tokens())
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=5e-6)
    found.square().sum().backward()
    made = [
        weight
        for path, weight in adapted.named_parameters()
        if "modules_to_save" in path and ("input_projections" in path or "global" in path)
    ]
    assert made and all(weight.grad is not None for weight in made)
