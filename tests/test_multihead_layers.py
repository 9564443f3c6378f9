"""torch's Transformer layers run the core of a MultiheadAttention in every mode; so do autocast and
torch.compile."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, usual_cases
from multihead_cases import (
    BATCH,
    CAUSAL_CASES,
    DOUBLE,
    HEADS,
    KEYS,
    SINGLE,
    SIZE,
    as_float,
    options_of,
    pair,
)
from small import causal_bool, layer_masks, possible
from stages import in_turn, only
from torch import Tensor, nn

from attnzoo import MultiheadAttention


def count_calls(module: Any) -> list[str]:
    """The list fills with the backend of every call of the core. Not a hook: torch's fast path
    steps aside for hooks."""
    calls: list[str] = []
    inner = module.attention.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        out = inner(*args, **kwargs)
        assert module.attention.last_backend is not None
        calls.append(module.attention.last_backend)
        return out

    module.attention.forward = forward
    return calls


def encoder_layer(
    case: Case | None, *, norm_first: bool = False, batch_first: bool = True, dropout: float = 0.0
) -> nn.TransformerEncoderLayer:
    """torch's own when case is None. Two heads, since torch's fast path refuses an odd number."""
    torch.manual_seed(4)
    layer = nn.TransformerEncoderLayer(
        SIZE, 2, 16, dropout, batch_first=batch_first, norm_first=norm_first
    )
    if case is not None:
        made = MultiheadAttention(SIZE, 2, batch_first=batch_first, **options_of(case))
        made.load_state_dict(layer.self_attn.state_dict(), strict=True)
        layer.self_attn = made
    return layer


def compose(layer: Any, x: Tensor, **masks: Any) -> Tensor:
    """The encoder layer's equations, by hand."""

    def attend(y: Tensor) -> Tensor:
        return layer.self_attn(y, y, y, need_weights=False, **masks)[0]

    def feed(y: Tensor) -> Tensor:
        return layer.linear2(F.relu(layer.linear1(y)))

    if layer.norm_first:
        x = x + attend(layer.norm1(x))
        return x + feed(layer.norm2(x))
    x = layer.norm1(x + attend(x))
    return layer.norm2(x + feed(x))


def compose_decoder(layer: Any, x: Tensor, memory: Tensor, memory_padding: Tensor) -> Tensor:
    """The decoder layer's equations, by hand; causal."""
    blocks = [
        (layer.norm1, lambda y: layer.self_attn(y, y, y, is_causal=True, need_weights=False)[0]),
        (
            layer.norm2,
            lambda y: layer.multihead_attn(
                y, memory, memory, key_padding_mask=memory_padding, need_weights=False
            )[0],
        ),
        (layer.norm3, lambda y: layer.linear2(F.relu(layer.linear1(y)))),
    ]
    for norm, block in blocks:
        x = x + block(norm(x)) if layer.norm_first else norm(x + block(x))
    return x


MODES = [
    (True, nullcontext),
    (False, nullcontext),
    (False, torch.no_grad),
    (False, torch.inference_mode),
    (True, torch.no_grad),
]


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize(("case", "norm_first"), in_turn(usual_cases(), [False, True]))
def test_encoder_layer_runs_the_core_in_every_mode(case: Case, norm_first: bool) -> None:
    layer, plain = (
        encoder_layer(case, norm_first=norm_first),
        encoder_layer(None, norm_first=norm_first),
    )
    calls = count_calls(layer.self_attn)
    x = torch.randn(BATCH, 40, SIZE)
    padding = torch.zeros(BATCH, 40, dtype=torch.bool)
    padding[1, 33:] = True
    causal = case.spec.causal
    for (training, context), padded, masked in itertools.product(
        MODES, (None, padding), (None, causal_bool(40)) if causal else (None,)
    ):
        if masked is None and not case.spec.bidirectional:
            continue
        layer.train(training)
        plain.train(training)
        calls.clear()
        with context():
            out = layer(x, src_mask=masked, src_key_padding_mask=padded)
            assert len(calls) == 1
            expected = compose(layer, x, key_padding_mask=padded, is_causal=masked is not None)
            exact = plain(x, src_mask=masked, src_key_padding_mask=padded)
        real = slice(None) if padded is None else ~padded
        torch.testing.assert_close(out, expected, **SINGLE)
        assert torch.allclose(out[real], exact[real], **SINGLE) == (case.spec.family == "exact")
        if masked is not None:
            with context():
                hinted = layer(
                    x,
                    src_mask=as_float(masked, torch.float32),
                    src_key_padding_mask=padded,
                    is_causal=True,
                )
            assert torch.equal(hinted, out)


@pytest.mark.parametrize(
    ("case", "swapped", "norm_first"), in_turn(usual_cases(), [("before", False), ("after", True)])
)
@pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors"
)
def test_encoder_stack_runs_the_core_in_every_mode(
    case: Case, norm_first: bool, swapped: str
) -> None:
    """With nested tensors on, as by default: a stack built before the swap hands them to its
    layers."""
    stack = nn.TransformerEncoder(
        encoder_layer(case if swapped == "before" else None, norm_first=norm_first), 2
    )
    if swapped == "after":
        for layer in stack.layers:
            layer.self_attn = encoder_layer(case, norm_first=norm_first).self_attn
    calls = [count_calls(layer.self_attn) for layer in stack.layers]
    x = torch.randn(BATCH, 40, SIZE)
    padding = torch.zeros(BATCH, 40, dtype=torch.bool)
    padding[1, 33:] = True
    for (training, context), padded in itertools.product(MODES, (None, padding)):
        if not case.spec.bidirectional:
            continue
        stack.train(training)
        for each in calls:
            each.clear()
        with context():
            out = stack(x, src_key_padding_mask=padded)
            assert [len(each) for each in calls] == [1, 1]
            expected = x
            for layer in stack.layers:
                expected = compose(layer, expected, key_padding_mask=padded)
        real = slice(None) if padded is None else ~padded
        torch.testing.assert_close(out[real], expected[real], **SINGLE)
    if case.spec.causal:
        with torch.no_grad():
            by_mask = stack.eval()(x, mask=nn.Transformer.generate_square_subsequent_mask(40))
            expected = x
            for layer in stack.layers:
                expected = compose(layer, expected, is_causal=True)
        torch.testing.assert_close(by_mask, expected, **SINGLE)


@pytest.mark.parametrize(
    ("case", "batch_first", "norm_first"),
    in_turn(
        [case for case in CAUSAL_CASES if case.spec.cross and case.spec.bidirectional],
        [(True, False), (False, True)],
    ),
)
def test_decoder_stack_runs_both_cores(case: Case, norm_first: bool, batch_first: bool) -> None:
    def decoder(case: Case) -> nn.TransformerDecoder:
        torch.manual_seed(6)
        layer = nn.TransformerDecoderLayer(
            SIZE, HEADS, 16, 0.0, batch_first=batch_first, norm_first=norm_first
        )
        for name in ("self_attn", "multihead_attn"):
            made = MultiheadAttention(SIZE, HEADS, batch_first=batch_first, **options_of(case))
            made.load_state_dict(getattr(layer, name).state_dict(), strict=True)
            setattr(layer, name, made)
        return nn.TransformerDecoder(layer, 2)

    stack = decoder(case)
    calls = [
        count_calls(getattr(layer, name))
        for layer in stack.layers
        for name in ("self_attn", "multihead_attn")
    ]
    x, memory = torch.randn(BATCH, 8, SIZE), torch.randn(BATCH, 11, SIZE)
    if not batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    padding = torch.zeros(BATCH, 11, dtype=torch.bool)
    padding[0, 6:] = True
    for (training, context), mask in itertools.product(
        MODES, (causal_bool(8), nn.Transformer.generate_square_subsequent_mask(8))
    ):
        stack.train(training)
        for each in calls:
            each.clear()
        with context():
            found = stack(x, memory, tgt_mask=mask, memory_key_padding_mask=padding)
            assert [len(each) for each in calls] == [1] * 4
            expected = x
            for layer in stack.layers:
                expected = compose_decoder(layer, expected, memory, padding)
        torch.testing.assert_close(found, expected, **SINGLE)


@pytest.mark.parametrize("case", usual_cases(), ids=str)
def test_gradients_flow_through_a_layer(case: Case) -> None:
    layer = encoder_layer(case)
    x = torch.randn(BATCH, 9, SIZE, requires_grad=True)
    padding = torch.zeros(BATCH, 9, dtype=torch.bool)
    padding[0, 5:] = True
    layer(x, src_key_padding_mask=padding, **layer_masks(case.spec, 9))[
        ~padding
    ].square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in layer.parameters()
    )


@pytest.mark.parametrize("case", usual_cases(), ids=str)
def test_autocast(case: Case) -> None:
    layer = encoder_layer(case)
    x = torch.randn(BATCH, 40, SIZE)
    padding = torch.zeros(BATCH, 40, dtype=torch.bool)
    padding[1, 33:] = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attended, _ = layer.self_attn(x, x, x, key_padding_mask=padding, **possible(case.spec))
        out = layer(
            x, src_key_padding_mask=padding, src_mask=causal_bool(40) if case.spec.causal else None
        )
        out.sum().backward()
    assert attended.dtype == torch.bfloat16
    full, _ = layer.self_attn(x, x, x, key_padding_mask=padding, **possible(case.spec))
    if case.spec.data_dependent:  # what is selected for a few rows turns on the digits lost
        same = torch.isclose(attended.float(), full, atol=0.05, rtol=0.05).all(-1)
        assert same.float().mean() > 0.9
    else:
        torch.testing.assert_close(attended.float(), full, atol=0.05, rtol=0.05)
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in layer.parameters()
    )


def test_autocast_with_float_masks_and_appended_keys_is_torchs() -> None:
    theirs, ours = pair(dtype=torch.float32, add_bias_kv=True, add_zero_attn=True)
    x, bias = torch.randn(KEYS, BATCH, SIZE), torch.randn(KEYS, KEYS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, _ = theirs(x, x, x, attn_mask=bias, need_weights=False)
        found, _ = ours(x, x, x, attn_mask=bias, need_weights=False)
    assert found.dtype == expected.dtype
    assert ours.attention.last_backend == "sdpa", (
        "the mask follows autocast, or the fast backend refuses it"
    )
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("name", only(["linear"], ["standard", "linear", "sliding_window"]))
def test_encoder_layer_compiles_into_one_graph(name: str) -> None:
    """Causal, one of each engine, forward alone: `test_swap_graphs.py` differentiates a layer,
    every variant's."""
    case = next(case for case in CAUSAL_CASES if case.variant == name)
    torch._dynamo.reset()
    layer = encoder_layer(case).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(BATCH, 9, SIZE)
    padding = torch.zeros(BATCH, 9, dtype=torch.bool)
    padding[1, 6:] = True
    call: dict[str, Any] = {
        "src_key_padding_mask": padding,
        "src_mask": causal_bool(9),
        "is_causal": True,
    }
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, **call), layer(x, **call), **SINGLE)


@pytest.mark.thorough
def test_a_compiled_graph_checks_the_masks_that_it_cannot_read() -> None:
    torch._dynamo.reset()
    module = MultiheadAttention(SIZE, HEADS, batch_first=True, attention="linear")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(BATCH, 9, SIZE)
    with pytest.raises(RuntimeError, match="linear cannot apply an attn_mask"):
        compiled(x, x, x, attn_mask=causal_bool(9).T, is_causal=True, need_weights=False)
    with pytest.raises(RuntimeError, match="linear cannot add a float key_padding_mask"):
        compiled(x, x, x, key_padding_mask=torch.randn(BATCH, 9), need_weights=False)
    with pytest.raises(Exception, match="say so with is_causal=True"):
        compiled(x, x, x, attn_mask=causal_bool(9), need_weights=False)


@pytest.mark.thorough
def test_a_compiled_standard_core_honours_a_float_padding_mask() -> None:
    torch._dynamo.reset()
    _, ours = pair(batch_first=True)
    x, bias = (
        torch.randn(BATCH, 9, SIZE, dtype=torch.float64),
        torch.randn(BATCH, 9, dtype=torch.float64),
    )
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for mask in (None, causal_bool(9)):
        call = {"key_padding_mask": bias, "attn_mask": mask}
        torch.testing.assert_close(compiled(x, x, x, **call), ours(x, x, x, **call), **DOUBLE)
