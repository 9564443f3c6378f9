"""Weights that are integers, or that accelerate's hooks bring when a layer is called: a layer is
called, its weight not looked at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import small
from stages import in_turn
from swap_models import answer, make, tokens
from test_swap_modules import encoder, vision
from torch import Tensor, nn

import attnzoo
from attnzoo import UnsupportedError

accelerate = pytest.importorskip("accelerate")
X = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(1))
MODELS: dict[str, Any] = {"torch": encoder, "timm": vision, "transformers": lambda: make("bert")}
NAMES = [name for name in attnzoo.names() if attnzoo.describe(name).spec.bidirectional]


def swapped(model: Any, name: str) -> Any:
    torch.manual_seed(7)  # of what Linformer draws
    return attnzoo.swap(model, name, **small(name))


def run(model: nn.Module, kind: str) -> Tensor:
    with torch.no_grad():
        return answer(model, tokens()) if kind == "transformers" else model(X)


class EightBits(nn.Module):
    """A linear layer with a scale for every output, as 8-bit kernels store it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        return nn.functional.linear(x, weight * self.scale, self.bias)


def in_eight_bits(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in names:
            setattr(
                model.get_submodule(path.rpartition(".")[0]),
                path.rpartition(".")[2],
                EightBits(module),
            )
    return model


PROJECTIONS = ("out_proj", "qkv", "proj", "query", "key", "value")


@pytest.mark.parametrize(("name", "kind"), in_turn(NAMES, [*MODELS]))
def test_eight_bits_before_a_swap_and_after_it(kind: str, name: str) -> None:
    exact = run(swapped(MODELS[kind](), name), kind)
    after = in_eight_bits(swapped(MODELS[kind](), name), PROJECTIONS)
    before = swapped(in_eight_bits(MODELS[kind](), PROJECTIONS), name)
    assert torch.equal(run(before, kind), run(after, kind))
    if not attnzoo.describe(name).spec.data_dependent:  # which sees other keys then
        assert 0 < float((run(after, kind) - exact).abs().max()) < 0.1 * float(exact.abs().max())


@pytest.mark.parametrize("kind", MODELS)
def test_torchs_own_eight_bits(kind: str) -> None:
    model = attnzoo.swap(MODELS[kind](), "standard")
    quantized = torch.ao.quantization.quantize_dynamic(model)
    with_eight = run(quantized, kind)
    assert 0 < float((with_eight - run(model, kind)).abs().max()) < 0.1
    attnzoo.unswap(quantized)
    if kind != "torch":  # whose encoder layers look at the weights of their linear layers
        torch.testing.assert_close(run(quantized, kind), with_eight, rtol=0.0, atol=1e-5)
    again = attnzoo.swap(torch.ao.quantization.quantize_dynamic(MODELS[kind]()), "standard")
    torch.testing.assert_close(run(again, kind), with_eight, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "first", "kind"),
    in_turn(NAMES, [(first, kind) for first in ("swap", "offload") for kind in MODELS]),
)
def test_weights_that_are_brought_for_a_call(kind: str, first: str, name: str) -> None:
    if kind == "torch" and first == "offload" and attnzoo.describe(name).spec.takes("global_mask"):
        return  # refused: test_copies_of_weights_that_are_elsewhere
    model = MODELS[kind]()
    exact, wanted = run(model, kind), run(swapped(MODELS[kind](), name), kind)
    for step in (first, "offload" if first == "swap" else "swap"):
        if step == "swap":
            swapped(model, name)
        else:
            accelerate.cpu_offload(model, execution_device="cpu")
    assert all(
        parameter.is_meta
        for path, parameter in model.named_parameters()
        if "proj" in path and "attention." not in path
    )
    assert torch.equal(run(model, kind), wanted)
    attnzoo.unswap(model)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(run(model, kind), exact)


def test_copies_of_weights_that_are_elsewhere() -> None:
    model = encoder()
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(
        UnsupportedError,
        match=r"layer 0 .*its weights are offloaded, and longformer begins with copies "
        r"of them; swap first",
    ):
        attnzoo.swap(model, "longformer")
