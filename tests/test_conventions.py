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


Q, K, V = (torch.randn(1, 2, n, 8, generator=torch.Generator().manual_seed(n)) for n in (3, 6, 7))
V = V[:, :, :6]


def seen(weigh: Any, queries: int, keys: int) -> Tensor:
    """Which keys each row reads, by values that tell them."""
    v = torch.eye(keys).expand(1, 2, -1, -1)
    return weigh(Q[:, :, :queries], K[:, :, :keys], v)[0, 0] != 0


def test_torch_sdpa() -> None:
    one = SPELLINGS["torch.sdpa"]
    rows = seen(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), 3, 6)
    assert one.alignment == "first" and torch.equal(rows, torch.ones(3, 6).tril() > 0)
    hidden = torch.zeros(3, 6, dtype=torch.bool)
    assert one.hidden_row == "0"
    assert not F.scaled_dot_product_attention(Q, K, V, attn_mask=hidden).any()
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[:, 2] = False
    rows = seen(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), 3, 6)
    assert one.mask == "True = attend" and torch.equal(rows, mask)
    bad = V.clone()
    bad[:, :, 2] = torch.nan
    assert F.scaled_dot_product_attention(Q, K, bad, attn_mask=mask).isnan().any()


def test_torch_multihead_attention() -> None:
    one, layer = (
        SPELLINGS["torch.MultiheadAttention"],
        nn.MultiheadAttention(8, 2, batch_first=True),
    )
    x = torch.randn(1, 4, 8)
    hidden = torch.tensor([[False, True, False, False]])
    _, weights = layer(x, x, x, key_padding_mask=hidden)
    assert one.mask == "True = hidden" and not weights[..., 1].any() and weights[..., 0].all()
    out, _ = layer(x, x, x, key_padding_mask=torch.ones(1, 4, dtype=torch.bool))
    assert one.hidden_row == "NaN" and bool(out.isnan().all())


def test_transformers() -> None:
    pytest.importorskip("transformers")
    from test_conformance import check
    from transformers.masking_utils import sliding_window_causal_mask_function
    from transformers.models.llama.modeling_llama import eager_attention_forward

    one = SPELLINGS["transformers"]
    report = check(eager_attention_forward, dialect="transformers", rules=["hidden rows"])
    assert one.hidden_row == "mean of v" and report.of("hidden rows").status == "holds"
    near = sliding_window_causal_mask_function(4)
    shown = sum(bool(near(0, 0, torch.tensor(9), torch.tensor(j))) for j in range(12))
    assert one.window_keys == 0 and shown == 4
