"""MultiheadAttention as RWKV-7's time mixing: the paper's equations in a float64 loop, and token
shift, bonus and norm by hand around other attentions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo import MultiheadAttention, UnsupportedError

SIZE, HEADS, WIDTH = 12, 3, 4
HOW: dict[str, Any] = {"need_weights": False, "is_causal": True}
CLOSE: Any = {"rtol": 1e-12, "atol": 1e-12}
PUBLISHED: dict[str, Any] = {
    "attention": "rwkv7",
    "bias": False,
    "token_shift": True,
    "bonus": True,
    "output_norm": "centered",
    "output_gate": "low_rank",
}
PROJECTIONS = ("q", "k", "v", "log_decay", "removal_rate", "gate")


def layer_of(**options: Any) -> Any:
    """In float64, with all its parameters away from where they begin."""
    torch.manual_seed(0)
    layer = MultiheadAttention(SIZE, HEADS, batch_first=True, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return layer


def time_mixing(layer: Any, x: Tensor) -> Tensor:
    """One sample, (length, SIZE), by the layer's weights: section 4 of the paper, token by token,
    with neither the engine nor the layer. The value residual of later layers is left out."""
    mix, gates = layer.token_shift, layer.attention.input_projections
    w_r, w_k, w_v = layer.in_proj_weight.chunk(3)
    state = x.new_zeros(HEADS, WIDTH, WIDTH)  # of values by keys
    last, rows = torch.zeros_like(x[0]), []
    for token in x:
        r_in, k_in, v_in, w_in, a_in, g_in = (
            token + (last - token) * getattr(mix, name) for name in PROJECTIONS
        )
        r, k, v = w_r @ r_in, w_k @ k_in, w_v @ v_in
        low = gates.log_decay
        d = low.out.weight @ torch.tanh(low.low.weight @ w_in) + low.out.bias
        w = torch.exp(-math.exp(-0.5) / (1 + torch.exp(-d)))
        low = gates.removal_rate
        a = 1 / (1 + torch.exp(-(low.out.weight @ (low.low.weight @ a_in) + low.out.bias)))
        first, _, second = layer.gate_proj
        g = second.weight @ (1 / (1 + torch.exp(-(first.weight @ g_in))))
        kappa = (k * gates.removal_key.scale).view(HEADS, WIDTH)
        k = k * (1 + (a - 1) * low.strength)
        parts = []
        for head in range(HEADS):
            here = slice(head * WIDTH, (head + 1) * WIDTH)
            unit = kappa[head] / kappa[head].square().sum().sqrt()
            change = torch.diag(w[here]) - torch.outer(unit, a[here] * unit)
            before = state[head].clone()
            new = before @ change + torch.outer(v[here], k[here])
            state = torch.cat([state[:head], new[None], state[head + 1 :]])
            row = new @ r[here]
            row = row - row.mean()
            row = row / (row.square().mean() + 1e-5 * WIDTH).sqrt()
            row = row * layer.out_norm.weight[here] + layer.out_norm.bias[here]
            parts.append(row + (r[here] * layer.bonus.weight[head] * k[here]).sum() * v[here])
        rows.append(layer.out_proj.weight @ (g * torch.cat(parts)))
        last = token
    return torch.stack(rows)


def test_equals_the_papers_equations() -> None:
    """Forward and the gradients of the hidden states and of every parameter."""
    layer, x = layer_of(**PUBLISHED), torch.randn(2, 15, SIZE).double().requires_grad_()
    wanted = torch.stack([time_mixing(layer, sample) for sample in x])
    out = layer(x, x, x, **HOW)[0]
    torch.testing.assert_close(out, wanted, **CLOSE)
    leaves, upstream = [x, *layer.parameters()], torch.randn_like(wanted)
    assert {name.split(".")[0] for name, _ in layer.named_parameters()} == {
        *("in_proj_weight", "attention", "out_proj"),
        *("token_shift", "bonus", "out_norm", "gate_proj"),
    }
    expected = torch.autograd.grad(wanted, leaves, upstream)
    for one, other in zip(torch.autograd.grad(out, leaves, upstream), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_equals_the_rwkv_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own time mixing with the layer's weights, in pieces that go on from each other."""
    monkeypatch.setenv("RWKV_V7_ON", "1")
    mix: Any = pytest.importorskip("rwkv.model").RWKV_x070_TMix_seq
    layer, x = layer_of(**PUBLISHED).float(), torch.randn(15, SIZE)
    layer.out_norm.eps = 64e-5  # whatever the width of a head
    gates = layer.attention.input_projections
    w, a, g = gates.log_decay, gates.removal_rate, layer.gate_proj
    packed = [weight.T for weight in layer.in_proj_weight.chunk(3)]
    norm, scale, bonus = layer.out_norm, gates.removal_key.scale, layer.bonus.weight.flatten()
    mixes = [
        getattr(layer.token_shift, name)
        for name in ("q", "log_decay", "k", "v", "removal_rate", "gate")
    ]
    low = [x for one in (w, a) for x in (one.out.bias, one.low.weight.T, one.out.weight.T)]
    told = [*low, *low[:3], g[0].weight.T, g[2].weight.T, scale, a.strength, bonus]
    told += [*packed, layer.out_proj.weight.T, norm.weight, norm.bias]
    last, state, rows = torch.zeros(SIZE), torch.zeros(HEADS, WIDTH, WIDTH), []
    with torch.no_grad():
        for part in x.split((9, 6)):
            out, last, state, _ = mix(0, HEADS, WIDTH, part, last, last, state, *mixes, *told)
            rows.append(out)
    torch.testing.assert_close(layer(x, x, x, **HOW)[0], torch.cat(rows), rtol=1e-5, atol=1e-5)


def test_steps_padding_and_pieces() -> None:
    """Decoding in pieces and back, padding ahead and inside, and packed rows, also of pieces whose
    tokens take turns, equal the loop over what they stand for."""
    layer, x = layer_of(**PUBLISHED), torch.randn(2, 15, SIZE).double()
    wanted = torch.stack([time_mixing(layer, sample) for sample in x])
    state, rows = layer.init_state(2), []
    for start, end in ((0, 7), (7, 7), (7, 8), (8, 15)):
        out, state = layer.step(x[:, start:end], state)
        rows.append(out)
        if end == 8:  # two wrong tokens, which are taken back
            _, ahead = layer.step(torch.randn(2, 2, SIZE).double(), state)
            state = ahead.crop(2)
    torch.testing.assert_close(torch.cat(rows, 1), wanted, **CLOSE)
    swapped = state.select(torch.tensor([1, 0]))
    more = torch.randn(2, 1, SIZE).double()
    found = layer.step(more, swapped)[0]
    again = torch.cat([x[[1, 0]], more], 1)
    expected = torch.stack([time_mixing(layer, sample)[-1:] for sample in again])
    torch.testing.assert_close(found, expected, **CLOSE)
    padding = torch.arange(18)[None].expand(2, -1) < 3
    padded = F.pad(x, (0, 0, 3, 0), value=torch.nan)
    out = layer(padded, padded, padded, padding, **HOW)[0][:, 3:]
    torch.testing.assert_close(out, wanted, **CLOSE)
    ids = (torch.arange(15) >= 6).long().expand(2, -1)
    turns = (torch.arange(15) % 2).expand(2, -1)
    for segments in (ids, turns):
        out = layer(x, x, x, segments=segments, **HOW)[0]
        for piece in (0, 1):
            here = segments[0] == piece
            expected = torch.stack([time_mixing(layer, sample[here]) for sample in x])
            torch.testing.assert_close(out[:, here], expected, **CLOSE)
    state = layer.step(x[:, :6], layer.init_state(2), segments=ids[:, :6])[1]
    out, _ = layer.step(x[:, 6:], state, segments=ids[:, 6:])
    expected = torch.stack([time_mixing(layer, sample[6:]) for sample in x])
    torch.testing.assert_close(out, expected, **CLOSE)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_shift_and_a_bonus_of_exact_attention(batch_first: bool) -> None:
    """By hand, beside a short convolution: a slot of padding inside counts as 0."""
    layer = layer_of(token_shift=True, bonus=True, short_convolution=2, bias=False)
    x, real = torch.randn(2, 9, SIZE).double(), torch.ones(2, 9, dtype=torch.bool)
    real[0, 4] = False
    clean = x * real[..., None]
    last = F.pad(clean, (0, 0, 1, 0))[:, :-1]
    made = torch.cat(
        [
            (clean + (last - clean) * getattr(layer.token_shift, name)) @ weight.T
            for name, weight in zip("qkv", layer.in_proj_weight.chunk(3), strict=True)
        ],
        -1,
    )
    made = made * real[..., None]
    taps = layer.short_convolution.weight[:, 0]
    made = F.silu(F.pad(made, (0, 0, 1, 0))[:, :-1] * taps[:, 0] + made * taps[:, 1])
    q, k, v = (one.unflatten(2, (HEADS, WIDTH)).transpose(1, 2) for one in made.chunk(3, 2))
    rows = layer.attention(q, k, v, key_mask=real, is_causal=True)
    rows = rows + (q * layer.bonus.weight[:, None] * k).sum(-1, keepdim=True) * v
    wanted = rows.transpose(1, 2).flatten(2) @ layer.out_proj.weight.T
    layer.batch_first = batch_first
    given = x if batch_first else x.transpose(0, 1)
    out = layer(given, given, given, ~real, **HOW)[0]
    out = out if batch_first else out.transpose(0, 1)
    torch.testing.assert_close(out[real], wanted[real], **CLOSE)
    sample = x[1]
    alone = layer(sample, sample, sample, **HOW)[0]
    torch.testing.assert_close(alone, out[1], **CLOSE)


def test_gates_that_a_call_brings() -> None:
    """Keys are then as they are projected."""
    layer, x = layer_of(attention="rwkv7"), torch.randn(2, 9, SIZE).double()
    q, k, v = (
        one.unflatten(2, (HEADS, WIDTH)).transpose(1, 2)
        for one in (x @ layer.in_proj_weight.T + layer.in_proj_bias).chunk(3, 2)
    )
    gates = layer.attention.input_projections
    rate = torch.rand(2, HEADS, 9, WIDTH).double()
    scale = gates.removal_key.scale.view(HEADS, 1, WIDTH)
    inputs = {
        "log_decay": -torch.rand(2, HEADS, 9, WIDTH).double(),
        "removal_key": F.normalize(k * scale, dim=-1),
        "removal_rate": rate,
    }
    rows = layer.attention(q, k, v, is_causal=True, **inputs)
    del inputs["removal_key"]
    wanted = layer.out_proj(rows.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, x, x, **HOW, **inputs)[0], wanted, **CLOSE)


def test_what_is_refused() -> None:
    x = torch.randn(2, 9, SIZE).double()
    layer = layer_of(token_shift=True)
    for query, key, value in ((x[:, 5:], x, x), (x, x.clone(), x), (x, x, x.clone())):
        with pytest.raises(UnsupportedError, match="token_shift=True reads the tokens before"):
            layer(query, key, value, is_causal=True)
    with pytest.raises(UnsupportedError, match="token_shift=True is causal, and this call is not"):
        layer(x, x, x)
    core: Any = {"attention": "linformer", "attention_options": {"max_length": 9, "rank": 2}}
    with pytest.raises(UnsupportedError, match="linformer cannot be causal"):
        layer_of(**core, token_shift=True)
    with pytest.raises(ValueError, match="token_shift=1 must be True or False"):
        layer_of(token_shift=1)
    with pytest.raises(ValueError, match=r"bonus=True adds .* append values of no token"):
        layer_of(bonus=True, add_bias_kv=True)
    with pytest.raises(UnsupportedError, match="bonus=True adds a token's own value to its row"):
        layer_of(bonus=True)(x, x.clone(), x)
    with pytest.raises(ValueError, match="token_shift=False, and this one has token_shift=True"):
        layer.step(x, layer_of().init_state(2))


@pytest.mark.thorough
def test_it_begins_as_published_and_lives_on() -> None:
    layer = layer_of(**PUBLISHED).float()
    layer._reset_parameters()
    layer.attention.input_projections.removal_rate.reset_parameters()
    layer.attention.input_projections.removal_key.reset_parameters()
    fresh: Any = MultiheadAttention(SIZE, HEADS, batch_first=True, **PUBLISHED)
    drawn = ("in_proj", "out_proj", "gate_proj", "log_decay", "low.weight", "out.weight")
    for name, x in fresh.named_parameters():
        if not any(part in name for part in drawn):
            assert torch.equal(x, layer.get_parameter(name)), name
    assert fresh.token_shift.q[0] == 1 > fresh.token_shift.q[-1] > 0
    again, x = layer_of(**PUBLISHED), torch.randn(2, 5, SIZE).double()
    layer = layer.double()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x, x, x, **HOW)[0], layer(x, x, x, **HOW)[0])
    layer = layer_of(**PUBLISHED)
    graph: Any = torch.compile(layer, backend="eager", fullgraph=True)
    for length in (5, 9):  # the second in one graph of symbolic lengths
        x = torch.randn(2, length, SIZE).double()
        padding = torch.arange(length).expand(2, -1) < 2
        ids = (torch.arange(length) >= 3).long().expand(2, -1)
        for more in ({}, {"key_padding_mask": padding}, {"segments": ids}):
            found, wanted = (one(x, x, x, **HOW, **more)[0] for one in (graph, layer))
            torch.testing.assert_close(found[:, 2:], wanted[:, 2:], **CLOSE)
    half, layer = x.float(), layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(half, half, half, **HOW)[0]
    assert out.dtype == torch.bfloat16
    for shape in ((0, 5, SIZE), (2, 0, SIZE)):
        x = torch.zeros(shape, requires_grad=True)
        assert layer(x, x, x, **HOW)[0].shape == shape
    assert isinstance(layer.out_norm, nn.GroupNorm)
