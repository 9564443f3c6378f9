"""MultiheadAttention as Mamba-2's layer: the skip and the norm of all heads by hand, and
transformers' Mamba2Mixer with the same weights."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from attnzoo import MultiheadAttention, UnsupportedError

SIZE, HEADS, WIDTH = 12, 3, 4
HOW: dict[str, Any] = {"need_weights": False, "is_causal": True}
CLOSE: Any = {"rtol": 1e-12, "atol": 1e-12}
PUBLISHED: dict[str, Any] = {
    "attention": "mamba2",
    "short_convolution": 4,
    "skip": True,
    "output_gate": "elementwise",
    "output_norm": "all_heads",
}


def layer_of(**options: Any) -> Any:
    torch.manual_seed(0)
    layer = MultiheadAttention(SIZE, HEADS, batch_first=True, **options).double()
    for name, parameter in layer.named_parameters():
        if name in ("skip.weight", "out_norm.weight"):
            nn.init.normal_(parameter, 1.0, 0.3)
    return layer


@pytest.mark.parametrize("gate", [None, "headwise", "elementwise"])
@pytest.mark.parametrize("norm", [False, True, "all_heads"])
def test_by_hand(norm: Any, gate: Any) -> None:
    """Of exact attention: a row and D times its value, gate and norm in their order."""
    layer = layer_of(skip=True, output_norm=norm, output_gate=gate)
    x = torch.randn(2, 9, SIZE).double()
    q, k, v = (x @ w.T for w in layer.in_proj_weight.chunk(3))
    q, k, v = (one.view(2, 9, HEADS, WIDTH) for one in (q, k, v))
    rows = torch.zeros_like(v)
    for t in range(9):
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, : t + 1]) / WIDTH**0.5
        rows[:, t] = torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, : t + 1])
    rows = rows + layer.skip.weight[:, None] * v
    opened: Any = 1.0
    if gate is not None:
        opened = layer.gate_proj(x).view(2, 9, HEADS, -1)
        opened = opened.sigmoid() * (opened if norm else 1)
    if norm is True:
        rows = rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.out_norm.weight
    rows = (rows * opened).flatten(2)
    if norm == "all_heads":
        rows = rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.out_norm.weight
    torch.testing.assert_close(layer(x, x, x, **HOW)[0], layer.out_proj(rows), **CLOSE)


def test_steps_padding_and_pieces() -> None:
    layer, x = layer_of(**PUBLISHED), torch.randn(2, 15, SIZE).double()
    wanted = layer(x, x, x, **HOW)[0]
    state, rows = layer.init_state(2), []
    for start, end in ((0, 7), (7, 8), (8, 15)):
        out, state = layer.step(x[:, start:end], state)
        rows.append(out)
    torch.testing.assert_close(torch.cat(rows, 1), wanted, **CLOSE)
    padding = torch.arange(18)[None].expand(2, -1) < 3
    padded = nn.functional.pad(x, (0, 0, 3, 0), value=torch.nan)
    out = layer(padded, padded, padded, padding, **HOW)[0][:, 3:]
    torch.testing.assert_close(out, wanted, **CLOSE)
    ids = (torch.arange(15) >= 6).long().expand(2, -1)
    wanted = torch.cat([layer(one, one, one, **HOW)[0] for one in x.split((6, 9), 1)], 1)
    torch.testing.assert_close(layer(x, x, x, segments=ids, **HOW)[0], wanted, **CLOSE)


def mixer() -> tuple[Any, Any]:
    """transformers' layer, whose keys and queries are the same in all heads, and its config."""
    module = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    config: Any = transformers.Mamba2Config
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_heads": HEADS, "head_dim": WIDTH, "state_size": WIDTH}
    made = config(
        hidden_size=SIZE, expand=1, n_groups=1, use_conv_bias=False, num_hidden_layers=1, **sizes
    )
    theirs = module.Mamba2Mixer(made, 0).eval()
    for parameter in (theirs.norm.weight, theirs.D):
        nn.init.normal_(parameter, 1.0, 0.3)
    return theirs, made


def of_mixer(theirs: Any) -> Any:
    """Ours, with keys and queries of every head alike."""
    gate, channels, step = theirs.in_proj.weight.split([SIZE, SIZE + 2 * WIDTH, HEADS])

    def as_ours(of_channels: Tensor) -> Tensor:
        values, keys, queries = of_channels.split([SIZE, WIDTH, WIDTH])
        alike = (1,) * (values.dim() - 1)
        return torch.cat([queries.repeat(HEADS, *alike), keys.repeat(HEADS, *alike), values])

    decay = "attention.input_projections.log_decay"
    ours = MultiheadAttention(SIZE, HEADS, bias=False, batch_first=True, **PUBLISHED)
    parts = {
        "in_proj_weight": as_ours(channels),
        "short_convolution.weight": as_ours(theirs.conv1d.weight),
        "gate_proj.weight": gate,
        "out_norm.weight": theirs.norm.weight,
        "skip.weight": theirs.D,
        "out_proj.weight": theirs.out_proj.weight,
        f"{decay}.out.weight": step,
        f"{decay}.A_log": theirs.A_log,
        f"{decay}.dt_bias": theirs.dt_bias,
    }
    ours.load_state_dict({name: x.detach().clone() for name, x in parts.items()})
    norm: Any = ours.out_norm
    norm.eps = theirs.norm.variance_epsilon
    return ours


def test_equals_transformers_mixer() -> None:
    """With its weights: forward, gradients, and decoding in pieces."""
    theirs, config = mixer()
    ours, x = of_mixer(theirs), torch.randn(2, 20, SIZE, requires_grad=True)
    wanted, out = theirs(x), ours(x, x, x, **HOW)[0]
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    decay = ours.attention.input_projections.log_decay
    pairs = [
        (ours.skip.weight, theirs.D),
        (ours.out_norm.weight, theirs.norm.weight),
        (ours.out_proj.weight, theirs.out_proj.weight),
        (decay.A_log, theirs.A_log),
        (decay.dt_bias, theirs.dt_bias),
    ]
    upstream = torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, [x, *(two for _, two in pairs)], upstream)
    found = torch.autograd.grad(out, [x, *(one for one, _ in pairs)], upstream)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    cache, state = transformers.DynamicCache(config=config), ours.init_state(2)
    with torch.no_grad():
        for start, end in ((0, 9), (9, 10), (10, 11)):
            wanted = theirs(x[:, start:end], cache_params=cache)
            out, state = ours.step(x[:, start:end], state)
            torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_what_is_refused() -> None:
    x = torch.randn(2, 9, SIZE).double()
    layer = layer_of(skip=True)
    for query, value in ((x[:, 5:], x), (x, x.clone())):
        with pytest.raises(UnsupportedError, match="queries and values must be of one sequence"):
            layer(query, x, value)
    with pytest.raises(ValueError, match=r"skip=True adds .* append values of no token"):
        layer_of(skip=True, add_zero_attn=True)
    with pytest.raises(ValueError, match="skip=1 must be True or False"):
        layer_of(skip=1)
    with pytest.raises(ValueError, match="output_norm='all' must be True, False, 'all_heads'"):
        layer_of(output_norm="all")


@pytest.mark.thorough
def test_it_begins_as_published_and_lives_on() -> None:
    layer = layer_of(**PUBLISHED)
    layer._reset_parameters()
    assert bool((layer.skip.weight == 1).all())
    again, x = layer_of(**PUBLISHED), torch.randn(2, 5, SIZE).double()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x, x, x, **HOW)[0], layer(x, x, x, **HOW)[0])
    graph: Any = torch.compile(layer, backend="eager", fullgraph=True)
    for length in (5, 9):  # the second in one graph of symbolic lengths
        x = torch.randn(2, length, SIZE).double()
        padding = torch.arange(length).expand(2, -1) < 2
        for more in ({}, {"key_padding_mask": padding}):
            found, wanted = (one(x, x, x, **HOW, **more)[0] for one in (graph, layer))
            torch.testing.assert_close(found[:, 2:], wanted[:, 2:], **CLOSE)
    half, layer = x.float(), layer.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(half, half, half, **HOW)[0]
    assert out.dtype == torch.bfloat16
