"""The table of spellings: its page is current, values come back, and what can be run here is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conventions_page import PAGE, page
from torch import Tensor, nn

from attnzoo.conventions import SPELLINGS, from_, to


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python docs/conventions_page.py"


def given(name: str) -> dict[str, Any]:
    one = SPELLINGS[name]
    found: dict[str, Any] = {}
    if one.layout in ("batch heads length width", "batch length heads width"):
        found["q"] = torch.randn(2, 3, 5, 4)
    if one.window_keys is not None:
        found["window"] = 7
    if one.mask:
        found["key_mask"] = torch.tensor([[True, False, True], [True, True, True]])
    if one.decay:
        found["log_decay"] = -torch.rand(2, 3, 5)
    if one.state:
        found["state"] = torch.randn(2, 3, 4, 6)
    return found


@pytest.mark.parametrize("name", SPELLINGS)
def test_values_come_back(name: str) -> None:
    ours = given(name)
    back = from_(name, **to(name, **ours))
    assert ours
    for word, value in ours.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(back[word], value)
        else:
            assert back[word] == value
    for word in {"window", "key_mask", "log_decay", "state"} - set(ours):
        with pytest.raises(ValueError, match=f"{name} has no word for"):
            to(name, **{word: None})


def test_misuse() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'jax\.nn'"):
        to("jax", q=torch.zeros(1, 1, 1, 1))
    with pytest.raises(ValueError, match="did you mean 'window'"):
        to("jax.nn", windw=3)
    for wrong in (torch.zeros(2, 2), "a"):
        with pytest.raises(ValueError, match="q must be a tensor of four axes, batch length heads"):
            to("fla", q=wrong)
    for turn, window in ((to, 0), (from_, -1)):
        with pytest.raises(ValueError, match=r"window=\S+ must be a whole number of at least"):
            turn("jax.nn", window=window)
    with pytest.raises(ValueError, match="holds no q of four axes"):
        to("onnx.LinearAttention", q=torch.zeros(1, 1, 1, 1))


def test_a_hidden_nan_of_torch_sdpa() -> None:
    q, k, v = (torch.randn(1, 2, n, 8) for n in (3, 6, 6))
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[:, 2] = False
    v[:, :, 2] = torch.nan
    assert F.scaled_dot_product_attention(q, k, v, attn_mask=mask).isnan().any()


def test_torch_multihead_attention_without_weights() -> None:
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(1, 4, 8)
    hidden = torch.ones(1, 4, dtype=torch.bool)
    out, _ = layer(x, x, x, key_padding_mask=hidden, need_weights=False)
    assert torch.equal(out, layer.out_proj.bias.expand(out.shape))
