"""Beside weights in integers: an attention takes the dtype that its queries have, and its own
layers are called, so that they can be exchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import in_models, small
from stages import in_turn
from swap_models import answer_of, make
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic

import attnzoo
from attnzoo import MultiheadAttention
from attnzoo.integrations.places import place_of
from attnzoo.registry import spec_of

pytest.importorskip("transformers", reason="needs transformers: pip install 'attnzoo[models]'")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated:DeprecationWarning",
    "ignore:.*drops entries of A",
    "ignore:must run observer",
)


class EightBits(nn.Linear):
    """A linear layer whose weight is stored in 8 bits, as bitsandbytes' is."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        weight, self.bias = linear.weight.detach(), linear.bias
        factor = float(weight.abs().max()) / 100
        self.factor = factor
        self.weight = nn.Parameter((weight / factor).to(dtype), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype) * self.factor, self.bias)


def in_eight_bits(model: nn.Module, dtype: torch.dtype) -> None:
    for name, part in list(model.named_children()):
        if type(part) is nn.Linear:
            setattr(model, name, EightBits(part, dtype))
        else:
            in_eight_bits(part, dtype)


@pytest.mark.parametrize(
    ("family", "name", "stored"),
    in_turn(
        [("llama" if spec_of(name).causal else "bert", name) for name in in_models()],
        [torch.int8, torch.float8_e4m3fn, "quantize_dynamic"],
    ),
)
def test_the_dtype_of_the_queries_whatever_stores_the_weights(
    family: str, name: str, stored: Any
) -> None:
    model = make(family).eval()
    dtype = torch.float32 if stored == "quantize_dynamic" else torch.bfloat16
    if stored == "quantize_dynamic":
        model = quantize_dynamic(model, {nn.Linear})
    else:
        model = model.to(dtype)
        in_eight_bits(model, stored)
    attnzoo.swap(model, name, **small(name))
    cores = [part for part in model.modules() if isinstance(part, attnzoo.Attention)]
    assert cores
    for core in cores:
        assert {
            x.dtype for x in (*core.parameters(), *core.buffers()) if x.is_floating_point()
        } <= {dtype}
    assert torch.isfinite(answer_of(family, model)).all()


def test_a_module_that_only_stores_asks_the_model_around_it() -> None:
    stored = nn.Module()
    assert place_of(stored) == (torch.device("cpu"), torch.float32)
    stored.register_buffer("weight", torch.zeros(2, dtype=torch.int8))
    stored.register_buffer("factors", torch.zeros(2, dtype=torch.float8_e4m3fn))
    model = nn.ModuleList([stored, nn.Linear(2, 2, dtype=torch.float16)])
    assert place_of(stored, model) == (torch.device("cpu"), torch.float16)


def longformer() -> tuple[MultiheadAttention, Tensor]:
    layer = MultiheadAttention(
        16,
        4,
        batch_first=True,
        attention="longformer",
        attention_options={"window": 3, "global_tokens": 1},
    ).eval()
    return layer, torch.randn(2, 12, 16)


def test_the_layer_of_global_rows_is_quantised_like_any_other() -> None:
    layer, x = longformer()
    smaller = quantize_dynamic(layer, {nn.Linear})
    assert type(smaller.attention.global_projection) is not nn.Linear
    torch.testing.assert_close(smaller(x, x, x)[0], layer(x, x, x)[0], rtol=0.0, atol=0.05)


class Adapted(nn.Module):
    """As LoRA wraps a layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.more = base, nn.Linear(16, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.more(x)


@pytest.mark.parametrize("cross", [False, True])
def test_the_layer_of_global_rows_is_adapted_like_any_other(cross: bool) -> None:
    layer, x = longformer()
    memory = torch.randn(2, 12, 16) if cross else x
    before = layer(x, memory, memory)[0]
    projection: Any = layer.attention.global_projection
    adapted = Adapted(projection)
    layer.attention.global_projection = adapted  # pyright: ignore[reportAttributeAccessIssue]
    after = layer(x, memory, memory)[0]
    after.sum().backward()
    assert adapted.more.weight.grad is not None and adapted.more.weight.grad.any()
    with torch.no_grad():
        projection.weight += adapted.more.weight
        adapted.more.weight.zero_()
    torch.testing.assert_close(layer(x, memory, memory)[0], after, rtol=0.0, atol=1e-5)
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("cross", [False, True])
def test_a_hook_on_the_layer_of_global_rows_fires(cross: bool) -> None:
    layer, x = longformer()
    calls: list[None] = []
    projection: Any = layer.attention.global_projection
    memory = torch.randn(2, 12, 16) if cross else x
    before = layer(x, memory, memory)[0]
    projection.register_forward_hook(lambda *_: calls.append(None))
    torch.testing.assert_close(layer(x, memory, memory)[0], before, rtol=0.0, atol=1e-6)
    assert len(calls) == 1 + cross
