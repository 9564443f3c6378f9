"""gpt-oss, whose softmax has a learned sink logit a head, swapped: transformers' own eager forward,
gradients, and generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from small import small
from swap_models import answer, make, padded, tokens

import attnzoo
from attnzoo import UnsupportedError
from attnzoo.registry import names, spec_of

#: As the model itself attends: windows of 6 and whole layers in turn.
ITS_OWN: dict[Any, Any] = {"0,2": ("sliding_window", {"window": 6}), "1": "standard"}
ROUNDING: Any = {"rtol": 1e-4, "atol": 1e-4}  # float32, logits of order 10 through three layers


def model_with_sinks() -> Any:
    model = make("gpt_oss", sliding_window=6, initializer_range=0.2, attn_implementation="eager")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_(0.0, 2.0, generator=torch.Generator().manual_seed(1))
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [6, None, 6]
    return model


def real(numbers: torch.Tensor, side: str) -> torch.Tensor:
    return numbers[padded(side).bool()]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(
    "mix",
    [ITS_OWN, {"1": "standard"}, {"0": ("sliding_window", {"window": 6})}],
    ids=["all", "whole", "window"],
)
def test_equals_the_eager_model(mix: dict[Any, Any], side: str) -> None:
    """With layers that are not swapped beside them, too."""
    model, mask = model_with_sinks(), padded(side)
    exact = answer(model, tokens(), attention_mask=mask)
    attnzoo.swap(model, mix)
    torch.testing.assert_close(
        real(answer(model, tokens(), attention_mask=mask), side), real(exact, side), **ROUNDING
    )
    attnzoo.unswap(model)
    assert torch.equal(answer(model, tokens(), attention_mask=mask), exact)


def test_gradients_reach_the_sinks() -> None:
    found = {}
    for name in ("eager", "swapped"):
        model = model_with_sinks()
        if name == "swapped":
            attnzoo.swap(model, ITS_OWN)
        numbers = real(answer(model, tokens(), attention_mask=padded("left")), "left")
        numbers.square().mean().backward()
        found[name] = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert all(
        float(found["eager"][f"model.layers.{layer}.self_attn.sinks"].norm()) > 1e-4
        for layer in range(3)
    )
    for key, gradient in found["eager"].items():
        torch.testing.assert_close(
            found["swapped"][key],
            gradient,
            rtol=1e-3,
            atol=1e-5,
            msg=lambda text, key=key: f"{key}: {text}",
        )


def test_a_sink_matters() -> None:
    model = attnzoo.swap(model_with_sinks(), ITS_OWN)
    before = answer(model, tokens())
    with torch.no_grad():
        model.model.layers[1].self_attn.sinks += 1
    assert float((answer(model, tokens()) - before).detach().abs().max()) > 1e-2


@pytest.mark.parametrize("cache", ["none", "dynamic", "static", "state"])
@pytest.mark.parametrize("mix", [ITS_OWN, {"1": "standard"}], ids=["all", "whole"])
def test_generates_what_the_eager_model_does(mix: dict[Any, Any], cache: str) -> None:
    settings: dict[str, Any] = {
        "attention_mask": padded("left", 12),
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
    }
    model = model_with_sinks()
    exact = model.generate(tokens(12), **settings)
    attnzoo.swap(model, mix)
    more: dict[str, Any] = {
        "none": {"use_cache": False},
        "static": {"cache_implementation": "static"},
    }.get(cache, {})
    if cache == "state":
        more = {"past_key_values": attnzoo.state_cache(model)}
    assert torch.equal(model.generate(tokens(12), **settings, **more), exact)
    assert len(set(exact[:, 12:].flatten().tolist())) > 4


def test_who_has_no_place_for_sinks_is_refused() -> None:
    for name in names():
        if spec_of(name).causal and not spec_of(name).takes("sink_logits"):
            sentence = (
                rf"layer 1 .*GptOssAttention has sink logits \(s_aux\) in its "
                rf"softmax, which {name} would drop"
            )
            with pytest.raises(UnsupportedError, match=sentence):
                attnzoo.swap(model_with_sinks(), name, layers=1, **small(name))
    with pytest.raises(UnsupportedError, match="build it with sink_logits=False"):
        attnzoo.swap(model_with_sinks(), "sliding_window", window=6, sink_logits=True)
