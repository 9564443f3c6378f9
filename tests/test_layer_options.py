"""Short convolution, gate and norm of the output as options of MultiheadAttention: by hand, in
transformers' layers, and under the rules of padding and packing."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from small import small
from torch import Tensor, nn

import attnzoo
from attnzoo import MultiheadAttention, UnsupportedError
from attnzoo.layers.input_projections import project_inputs
from attnzoo.registry import spec_of

SIZE, HEADS, WIDTH = 16, 4, 4
OPTIONS: dict[str, Any] = {
    "short_convolution": 3,
    "output_gate": "elementwise",
    "output_norm": True,
}
CLOSE: Any = {"rtol": 1e-12, "atol": 1e-12}
CAUSAL = [name for name in attnzoo.names() if spec_of(name).causal]
HOW: dict[str, Any] = {"need_weights": False, "is_causal": True}


def layer_of(name: str, **more: Any) -> MultiheadAttention:
    torch.manual_seed(0)
    options = {"attention": name, "attention_options": small(name), **OPTIONS, **more}
    layer: Any = MultiheadAttention(SIZE, HEADS, batch_first=True, **options).double()
    if "out_norm" in layer._modules:
        nn.init.normal_(layer.out_norm.weight, 1.0, 0.3)
    return layer


def convolved(x: Tensor, weight: Tensor, real: Tensor, ids: Tensor) -> Tensor:
    """silu of Σ_j w_j x_{t-j} over real tokens of the same piece, whose slots are counted.

    x: (batch, length, channels). weight: (channels, taps). real, ids: (batch, length)
    """
    out, taps = torch.zeros_like(x), weight.shape[1]
    for sample in range(x.shape[0]):
        for piece in ids[sample].unique():
            slots = (ids[sample] == piece).nonzero()[:, 0].tolist()
            for place, slot in enumerate(slots):
                for back in range(min(taps, place + 1)):
                    source = slots[place - back]
                    if real[sample, source]:
                        out[sample, slot] += x[sample, source] * weight[:, taps - 1 - back]
    return out * out.sigmoid()


@pytest.mark.parametrize("gate", [None, "headwise", "elementwise"])
@pytest.mark.parametrize("norm", [False, True])
def test_by_hand(gate: Any, norm: bool) -> None:
    """With padding ahead, inside and behind, and pieces that stand together or do not."""
    layer: Any = layer_of("gated_deltanet", output_gate=gate, output_norm=norm)
    x = torch.randn(3, 12, SIZE).double()
    real = torch.ones(3, 12, dtype=torch.bool)
    real[0, :3] = real[1, 4:6] = real[2, 10:] = False
    ids = torch.arange(12) // torch.tensor([[12], [5], [12]])
    ids[2] = torch.arange(12) % 2
    channels = x @ layer.in_proj_weight.T
    made = convolved(channels, layer.short_convolution.weight[:, 0], real, ids)
    q, k, v = (one.unflatten(2, (HEADS, WIDTH)).transpose(1, 2) for one in made.chunk(3, 2))
    inputs = project_inputs(layer, x, x, k, ())
    masks: Any = {"key_mask": real, "segments": ids, "is_causal": True}
    rows = layer.attention(q, k, v, **inputs, **masks).transpose(1, 2)
    if norm:
        scale = (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        rows = rows / scale * layer.out_norm.weight
    if gate is not None:
        opened = x @ layer.gate_proj.weight.T + layer.gate_proj.bias
        opened = opened.unflatten(2, (HEADS, -1))
        rows = rows * opened.sigmoid() * (opened if norm else 1)
    wanted = layer.out_proj(rows.flatten(2))
    out, weights = layer(x, x, x, ~real, is_causal=True, segments=ids, average_attn_weights=False)
    torch.testing.assert_close(out[real], wanted[real], **CLOSE)
    expected = layer.attention.weights(q, k, **inputs, **masks)
    torch.testing.assert_close(weights, expected, **CLOSE)


def qwen3_next() -> Any:
    config: Any = transformers.Qwen3NextConfig
    return config(
        hidden_size=SIZE,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH,
        linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=WIDTH,
        linear_value_head_dim=WIDTH,
        linear_conv_kernel_dim=4,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        pad_token_id=0,
    )


def with_weights_of(theirs: Any, parts: dict[str, Tensor], **options: Any) -> Any:
    """A layer with the weights of one of transformers', all of which it has."""
    ours = MultiheadAttention(SIZE, HEADS, bias=False, batch_first=True, **options)
    ours.load_state_dict({name: x.detach().clone() for name, x in parts.items()})
    assert sum(x.numel() for x in ours.parameters()) == sum(x.numel() for x in theirs.parameters())
    return ours


def compare(ours: Any, x: Tensor, wanted: Tensor, pairs: list[Any]) -> None:
    """Outputs and gradients. pairs: of our parameters and theirs, as ours has them"""
    out, upstream = ours(x, x, x, **HOW)[0], torch.randn_like(wanted)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(wanted, [x, *(two for _, two in pairs)], upstream)
    found = torch.autograd.grad(out, [x, *(one for one, _ in pairs)], upstream)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_equals_qwen3_nexts_recurrent_layer() -> None:
    """With its weights: forward, gradients, and decoding in pieces."""
    module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    torch.manual_seed(0)
    config = qwen3_next()
    theirs = module.Qwen3NextGatedDeltaNet(config, 0)
    nn.init.normal_(theirs.norm.weight, 1.0, 0.3)
    nn.init.normal_(theirs.dt_bias, -4.0)  # an all but closed gate has a gradient of rounding
    by_head = theirs.in_proj_qkvz.weight.unflatten(0, (HEADS, 4, WIDTH)).transpose(0, 1)
    strength, step = theirs.in_proj_ba.weight.unflatten(0, (HEADS, 2)).transpose(0, 1)
    gates = "attention.input_projections"
    ours = with_weights_of(
        theirs,
        {
            "in_proj_weight": by_head[:3].flatten(0, 2),
            "out_proj.weight": theirs.out_proj.weight,
            "short_convolution.weight": theirs.conv1d.weight,
            "gate_proj.weight": by_head[3].flatten(0, 1),
            "out_norm.weight": theirs.norm.weight,
            f"{gates}.beta.out.weight": strength,
            f"{gates}.log_decay.out.weight": step,
            f"{gates}.log_decay.A_log": theirs.A_log,
            f"{gates}.log_decay.dt_bias": theirs.dt_bias,
        },
        attention="gated_deltanet",
        short_convolution=4,
        output_gate="elementwise",
        output_norm=True,
    )
    x = torch.randn(2, 20, SIZE, requires_grad=True)
    decay = ours.attention.input_projections.log_decay
    pairs = [
        (ours.short_convolution.weight, theirs.conv1d.weight),
        (ours.out_norm.weight, theirs.norm.weight),
        (ours.out_proj.weight, theirs.out_proj.weight),
        (decay.A_log, theirs.A_log),
        (decay.dt_bias, theirs.dt_bias),
    ]
    compare(ours, x, theirs(x), pairs)
    cache, state = transformers.DynamicCache(config=config), ours.init_state(2)
    with torch.no_grad():
        for start, end in ((0, 9), (9, 10), (10, 11), (11, 20)):
            wanted = theirs(x[:, start:end], cache_params=cache)
            out, state = ours.step(x[:, start:end], state)
            torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_equals_qwen3_nexts_softmax_layer() -> None:
    """Forward, gradients, and decoding in pieces. Its norms weigh by one more than their weight,
    and its doubled projection makes a query and its gate head by head."""
    module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    torch.manual_seed(0)
    config = qwen3_next()
    theirs = module.Qwen3NextAttention(config, 1)
    for norm in (theirs.q_norm, theirs.k_norm):
        nn.init.normal_(norm.weight, 0.0, 0.3)
    queries, gate = theirs.q_proj.weight.unflatten(0, (HEADS, 2, WIDTH)).transpose(0, 1)
    packed = [queries.flatten(0, 1), theirs.k_proj.weight, theirs.v_proj.weight]
    ours = with_weights_of(
        theirs,
        {
            "in_proj_weight": torch.cat(packed),
            "out_proj.weight": theirs.o_proj.weight,
            "gate_proj.weight": gate.flatten(0, 1),
            "q_norm.weight": 1 + theirs.q_norm.weight,
            "k_norm.weight": 1 + theirs.k_norm.weight,
        },
        qk_norm="per_head",
        rotary={"base": 500.0, "width": WIDTH // 2},
        output_gate="elementwise",
    )
    x, slots = torch.randn(2, 9, SIZE, requires_grad=True), torch.arange(9)
    turns = module.Qwen3NextRotaryEmbedding(config)(x, slots[None])
    hidden = torch.zeros(9, 9).masked_fill(slots[:, None] < slots, -torch.inf)
    wanted = theirs(x, position_embeddings=turns, attention_mask=hidden)[0]
    pairs = [
        (ours.q_norm.weight, theirs.q_norm.weight),
        (ours.k_norm.weight, theirs.k_norm.weight),
        (ours.out_proj.weight, theirs.o_proj.weight),
    ]
    compare(ours, x, wanted, pairs)
    upstream = torch.randn_like(wanted)
    (expected,) = torch.autograd.grad(
        theirs(x, position_embeddings=turns, attention_mask=hidden)[0],
        theirs.q_proj.weight,
        upstream,
    )
    to_all, to_gate = torch.autograd.grad(
        ours(x, x, x, **HOW)[0], [ours.in_proj_weight, ours.gate_proj.weight], upstream
    )
    found = [one.unflatten(0, (HEADS, 1, WIDTH)) for one in (to_all[:SIZE], to_gate)]
    torch.testing.assert_close(torch.cat(found, 1).flatten(0, 2), expected, rtol=1e-4, atol=1e-5)
    cache: Any = transformers.DynamicCache(config=config)
    state = ours.init_state(2)
    with torch.no_grad():
        for start, end in ((0, 4), (4, 5), (5, 9)):
            own = tuple(turn[:, start:end] for turn in turns)
            how = {"attention_mask": hidden[start:end, :end], "past_key_values": cache}
            wanted = theirs(x[:, start:end], position_embeddings=own, **how)[0]
            out, state = ours.step(x[:, start:end], state)
            torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_padding_and_packing_do_not_reach_it(name: str) -> None:
    """Forward and backward: padding ahead and behind, and pieces."""
    layer, x = layer_of(name), torch.randn(2, 20, SIZE).double().requires_grad_()
    wanted = layer(x, x, x, **HOW)[0]
    upstream = torch.randn_like(wanted)
    (expected,) = torch.autograd.grad(wanted, x, upstream)
    for ahead, behind in ((3, 0), (0, 4)):
        padding = F.pad(torch.zeros(2, 20, dtype=torch.bool), (ahead, behind), value=True)
        held = F.pad(x, (0, 0, ahead, behind), value=7.0)
        padded = held.detach().requires_grad_()
        out = layer(padded, padded, padded, padding, **HOW)[0][:, ahead : ahead + 20]
        torch.testing.assert_close(out, wanted, **CLOSE)
        (found,) = torch.autograd.grad(out, padded, upstream)
        torch.testing.assert_close(found[:, ahead : ahead + 20], expected, **CLOSE)
        assert not bool(found[padding].any())
    lengths = (5, 9, 6)
    ids = torch.arange(3).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    wanted = torch.cat([layer(one, one, one, **HOW)[0] for one in x.split(lengths, 1)], 1)
    out = layer(x, x, x, segments=ids, **HOW)[0]
    torch.testing.assert_close(out, wanted, **CLOSE)


@pytest.mark.parametrize("name", ["standard", "gated_deltanet"])
def test_a_layer_lives_on(name: str) -> None:
    layer, x = layer_of(name, qk_norm="per_head"), torch.randn(2, 9, SIZE).double()
    wanted = layer(x, x, x, **HOW)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, x, x, **HOW)[0], wanted)
    fresh: Any = layer_of(name, qk_norm="per_head")
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(7.0)
    fresh._reset_parameters()
    assert bool((fresh.out_norm.weight == 1).all())
    for module in (fresh.short_convolution, fresh.gate_proj):
        assert 0 < module.weight.abs().max() < 1
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x, x, x, **HOW)[0], wanted)
    with pytest.raises(RuntimeError, match=r"short_convolution\.weight"):
        fresh.load_state_dict(nn.MultiheadAttention(SIZE, HEADS).state_dict())


def test_the_rest_begins_as_without_them() -> None:
    bare = {"short_convolution": None, "output_gate": None, "output_norm": False}
    plain = layer_of("gated_deltanet", **bare).state_dict()
    held = layer_of("gated_deltanet").state_dict()
    assert all(torch.equal(held[name], x) for name, x in plain.items())
    assert sorted(held.keys() - plain.keys()) == [
        "gate_proj.bias",
        "gate_proj.weight",
        "out_norm.weight",
        "short_convolution.weight",
    ]


@pytest.mark.thorough
def test_in_torchs_layers_and_one_graph() -> None:
    encoder: Any = nn.TransformerEncoderLayer(SIZE, HEADS, 32, 0.0, batch_first=True).double()
    encoder.self_attn = layer = layer_of("gated_deltanet")
    x, padding = torch.randn(2, 9, SIZE).double(), torch.zeros(2, 9, dtype=torch.bool)
    padding[0, :2] = True
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    how: Any = {"src_mask": hidden, "src_key_padding_mask": padding, "is_causal": True}
    wanted = encoder(x, **how)
    encoder.eval()
    with torch.no_grad():
        found = encoder(x, **how)
    torch.testing.assert_close(found[~padding], wanted[~padding])
    with attnzoo.packed(encoder, torch.arange(9).expand(2, -1) // 4):
        apart = encoder(x, src_mask=hidden, is_causal=True)
    torch.testing.assert_close(apart[:, 4:8], encoder(x[:, 4:8], src_mask=hidden[:4, :4]))
    graph: Any = torch.compile(layer, backend="eager", fullgraph=True)
    ids = torch.arange(3).repeat_interleave(3).expand(2, -1)
    for more in ({"key_padding_mask": padding}, {"segments": ids}):
        torch.testing.assert_close(
            graph(x, x, x, **HOW, **more)[0], layer(x, x, x, **HOW, **more)[0]
        )


@pytest.mark.filterwarnings("error")
def test_in_half_precision() -> None:
    """Of the module, and of its products alone."""
    layer, x = layer_of("standard").float(), torch.randn(2, 9, SIZE)
    ids = torch.arange(9).expand(2, -1) // 4
    for more in ({}, {"segments": ids}):
        wanted = layer(x, x, x, **HOW, **more)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x, x, x, **HOW, **more)[0]
        half, whole = x.bfloat16(), copy.deepcopy(layer).bfloat16()
        for found in (out, whole(half, half, half, **HOW, **more)[0]):
            assert found.dtype == torch.bfloat16
            torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.02)


def test_empty_calls() -> None:
    layer: Any = layer_of("gated_deltanet")
    for shape in ((0, 5, SIZE), (2, 0, SIZE)):
        x = torch.zeros(shape).double().requires_grad_()
        out = layer(x, x, x, **HOW)[0]
        assert out.shape == shape
        out.sum().backward()
        assert not layer.short_convolution.weight.grad.any()


def test_macs_are_counted() -> None:
    """A tap of every channel, and the gate's projection."""
    layer, x = layer_of("standard").float(), torch.randn(1, 20, SIZE)
    bare = {"short_convolution": None, "output_gate": None, "output_norm": False}
    plain = layer_of("standard", **bare).float()
    counts = [attnzoo.count_flops(one, x, x, x, **HOW).macs for one in (layer, plain)]
    assert counts[0] - counts[1] == 20 * (3 * 3 * SIZE + SIZE**2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short_convolution": 0}, "short_convolution=0 must be a whole number of at least 1"),
        ({"short_convolution": True}, "short_convolution=True must be a whole number"),
        ({"attention": "linformer"}, "short_convolution=3 reads earlier.*linformer cannot be cau"),
        ({"output_gate": "head"}, "output_gate='head' is unknown .did you mean 'headwise'"),
        ({"output_norm": 1}, "output_norm=1 must be True, False, 'all_heads'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_of(**{"name": options.pop("attention", "standard"), **options})


def test_calls_that_it_cannot_be_part_of() -> None:
    layer, x = layer_of("standard"), torch.randn(2, 9, SIZE).double()
    with pytest.raises(UnsupportedError, match="is causal, and this call is not: pass is_causal"):
        layer(x, x, x)
    with pytest.raises(UnsupportedError, match="is causal, and this call is not"):
        layer(x, x, x, attn_mask=torch.randn(9, 9).double())
    for query, key, value in ((x[:, 5:], x, x), (x, x.clone(), x), (x, x, x.clone())):
        with pytest.raises(UnsupportedError, match="so all must be one sequence"):
            layer(query, key, value, is_causal=True)
