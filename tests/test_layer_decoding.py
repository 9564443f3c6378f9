"""Decoding with MultiheadAttention, every option included: rows equal those of the causal forward,
whatever padding and packing came before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import small
from torch import Tensor

import attnzoo
from attnzoo import MultiheadAttention, UnsupportedError
from attnzoo.registry import spec_of

DECODING = [name for name in attnzoo.names() if spec_of(name).decodes]
CLOSE: Any = {"rtol": 1e-12, "atol": 1e-12}


def layer_of(name: str, **more: Any) -> MultiheadAttention:
    torch.manual_seed(0)
    options = {
        "qk_norm": "per_head",
        "rotary": {"base": 100.0},
        "short_convolution": 3,
        "output_gate": "headwise",
        "output_norm": True,
        "batch_first": True,
        **more,
    }
    options.setdefault("attention_options", small(name))
    return MultiheadAttention(16, 4, attention=name, **options).double()


def stepped(layer: MultiheadAttention, x: Tensor, cuts: list[int], **masks: Tensor) -> Tensor:
    state, rows = layer.init_state(len(x)), []
    starts = [0, *cuts]
    for start, end in zip(starts, [*cuts, x.shape[1]], strict=True):
        own = {name: mask[:, start:end] for name, mask in masks.items()}
        out, state = layer.step(x[:, start:end], state, **own)
        rows.append(out)
    assert state.seen == x.shape[1]
    return torch.cat(rows, 1)


@pytest.mark.parametrize("name", DECODING)
def test_steps_equal_the_forward(name: str) -> None:
    """With padding ahead, a whole step of it among it, and behind."""
    layer, x = layer_of(name), torch.randn(2, 20, 16).double()
    cuts = [2, 9, 10, 17]
    wanted = layer(x, x, x, need_weights=False, is_causal=True)[0]
    torch.testing.assert_close(stepped(layer, x, cuts), wanted, **CLOSE)
    padding = torch.zeros(2, 20, dtype=torch.bool)
    padding[0, :4] = padding[1, 18:] = True
    wanted = layer(x, x, x, padding, need_weights=False, is_causal=True)[0]
    if name == "longformer":  # whose global tokens must come in the first step
        cuts = cuts[1:]
    found = stepped(layer, x, cuts, key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], wanted[~padding], **CLOSE)


@pytest.mark.parametrize("name", DECODING)
def test_pieces_begin_anew(name: str) -> None:
    """In the middle of a step and between two, with padding ahead of one."""
    layer, x = layer_of(name), torch.randn(2, 20, 16).double()
    ids = torch.stack([torch.arange(20) // 7, (torch.arange(20) >= 9).long()])
    padding = torch.zeros(2, 20, dtype=torch.bool)
    padding[0, 7:9] = True
    how: dict[str, Any] = {"need_weights": False, "is_causal": True}
    wanted = layer(x, x, x, padding, segments=ids, **how)[0]
    cuts = [3, 15] if name == "longformer" else [3, 8, 9, 15]  # global tokens: see above
    found = stepped(layer, x, cuts, key_padding_mask=padding, segments=ids)
    torch.testing.assert_close(found[~padding], wanted[~padding], **CLOSE)


@pytest.mark.parametrize("name", ["standard", "linear", "sliding_window"])
def test_states_go_back_and_branch(name: str) -> None:
    layer, x = layer_of(name), torch.randn(2, 20, 16).double()
    wanted = layer(x, x, x, need_weights=False, is_causal=True)[0]
    _, state = layer.step(x[:, :9], layer.init_state(2))
    _, drafted = layer.step(torch.randn(2, 4, 16).double(), state)
    for behind in (state, drafted.crop(4)):
        out, _ = layer.step(x[:, 9:], behind)
        torch.testing.assert_close(out, wanted[:, 9:], **CLOSE)
    for rows in ([1, 1, 0], [0]):
        out, _ = layer.step(x[rows, 9:], drafted.crop(4).select(torch.tensor(rows)))
        torch.testing.assert_close(out, wanted[rows, 9:], **CLOSE)
    assert state.held_bytes() > state.core.held_bytes() + 2 * (3 * 16) * (9 + 2) * 8
    _, more = layer.step(x[:, 9:15], state)
    out, _ = layer.step(x[:, 12:], more.crop(1).crop(2))
    torch.testing.assert_close(out, wanted[:, 12:], **CLOSE)
    with pytest.raises(ValueError, match="n=3 must be a whole number from 0 to 2"):
        more.crop(4).crop(3)
    _, one = layer.step(x[:, 9:10], state)
    with pytest.raises(ValueError, match="n=2 must be a whole number from 0 to 1"):
        one.crop(2)
    _, same = layer.step(x[:, :0], one)
    torch.testing.assert_close(layer.step(x[:, 10:], same)[0], wanted[:, 10:], **CLOSE)
    torch.testing.assert_close(layer.step(x[:, 9:], same.crop(1))[0], wanted[:, 9:], **CLOSE)


def test_a_long_step_goes_back_128() -> None:
    layer, x = layer_of("linear"), torch.randn(1, 140, 16).double()
    wanted = layer(x, x, x, need_weights=False, is_causal=True)[0]
    _, state = layer.step(x, layer.init_state(1))
    out, _ = layer.step(x[:, 12:], state.crop(128))
    torch.testing.assert_close(out, wanted[:, 12:], **CLOSE)


def test_a_convolution_of_global_tokens_that_come_late() -> None:
    layer = layer_of("longformer", attention_options={"window": 4})
    x, mask = torch.randn(2, 6, 16).double(), torch.zeros(2, 3, dtype=torch.bool)
    _, state = layer.step(x[:, :3], layer.init_state(2))
    with pytest.raises(ValueError, match="name global tokens from the first step on"):
        layer.step(x[:, 3:], state, global_mask=mask)


def test_other_layouts() -> None:
    layer, x = layer_of("standard", batch_first=False), torch.randn(20, 2, 16).double()
    wanted = layer(x, x, x, need_weights=False, is_causal=True)[0]
    _, state = layer.step(x[:9], layer.init_state(2))
    torch.testing.assert_close(layer.step(x[9:], state)[0], wanted[9:], **CLOSE)
    _, state = layer.step(x[:9, 0], layer.init_state(1))
    torch.testing.assert_close(layer.step(x[9:, 0], state)[0], wanted[9:, 0], **CLOSE)


def test_what_a_step_refuses() -> None:
    layer, x = layer_of("standard"), torch.randn(2, 3, 16).double()
    state: Any = layer.init_state(2)
    with pytest.raises(ValueError, match=r"key_padding_mask has dtype torch\.float64"):
        layer.step(x, state, torch.zeros(2, 3).double())
    with pytest.raises(ValueError, match=r"state is a .*; give what init_state"):
        layer.step(x, state.core)
    with pytest.raises(ValueError, match="query has 8 features"):
        layer.step(x[..., :8], state)
    with pytest.raises(UnsupportedError, match="which a state has no place for"):
        MultiheadAttention(16, 4, add_zero_attn=True).init_state(2)
    assert layer.step(x[:, :0], state)[1].seen == 0


@pytest.mark.parametrize(
    ("one", "other", "name"),
    [
        ({"short_convolution": 4}, {}, "short_convolution"),
        ({}, {"short_convolution": 4}, "short_convolution"),
        ({"short_convolution": 4}, {"short_convolution": 2}, "short_convolution"),
        ({"rotary": True}, {}, "rotary"),
    ],
)
def test_a_state_of_a_layer_with_other_options_is_refused(
    one: dict[str, Any], other: dict[str, Any], name: str
) -> None:
    def layer(options: dict[str, Any]) -> attnzoo.MultiheadAttention:
        return attnzoo.MultiheadAttention(
            16, 2, batch_first=True, attention="gated_deltanet", **options
        )

    x, maker = torch.randn(1, 4, 16), layer(one)
    _, state = maker.step(x, maker.init_state(1))
    with pytest.raises(ValueError, match=f"state is of a layer with {name}="):
        layer(other).step(x, state)
