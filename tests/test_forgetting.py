"""Forgetting attention with its gates, beside what `test_gates` asks of all gates: tiles, what they
leave unread, and sums over long inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Situation, close, gradients_of, padding, tensors
from torch import Tensor

import attnzoo
from attnzoo.engines.softmax.tiles import row_tiles
from attnzoo.oracles import ORACLES

SITUATIONS = [
    Situation(300, 300, heads=2, kv_heads=1, batch=1),
    Situation(150, 300, "left", heads=2, kv_heads=2),
    Situation(300, 150, "interior", heads=2, kv_heads=1),
    Situation(290, 290, "whole", heads=1, kv_heads=1),
]


def gates(situation: Situation, kind: str, seed: int = 2) -> Tensor:
    """(batch, heads, key_length). slow: ALiBi's slopes. fast: most keys fade below rounding.
    closed: some gates close, by -inf and by the lowest numbers of two dtypes."""
    shape = (situation.batch, situation.heads, situation.key_length)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).double()
    if kind == "slow":
        return -(2.0 ** -torch.arange(3, 3 + situation.heads)).double()[:, None].expand(shape)
    if kind == "fast":
        return -6 * x
    for place, low in ((10, -torch.inf), (140, torch.finfo(torch.float32).min), (145, -65504.0)):
        x[:, 0, place % situation.key_length] = -low
    return -x


@pytest.mark.parametrize("kind", ["slow", "fast", "closed"])
@pytest.mark.parametrize("situation", SITUATIONS, ids=str)
def test_tiles_and_their_gradients(situation: Situation, kind: str) -> None:
    """Several tiles, with gates of which some let nothing pass, in both precisions."""
    *qkv, upstream = tensors(situation)
    given, mask = gates(situation, kind), situation.key_mask()
    leaves = [x.clone().requires_grad_() for x in (*qkv, given)]
    how: Any = {"key_mask": mask, "is_causal": True}
    expected, _ = ORACLES["forgetting"](*leaves[:3], log_decay=leaves[3], **how)
    wanted = gradients_of(expected, upstream, *leaves)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 64 * 2**-24)):
        attn = attnzoo.build("forgetting", situation.heads, 8, backend="tiles")
        q, k, v, g = (x.detach().to(dtype).requires_grad_() for x in leaves)
        out = attn(q, k, v, log_decay=g, **how)
        close(out, expected, tolerance, f"rows in {dtype}")
        found = gradients_of(out, upstream.to(dtype), q, k, v, g)
        for name, x, y in zip(("q", "k", "v", "log_decay"), found, wanted, strict=True):
            close(x, y, tolerance, f"gradient of {name} in {dtype}")
        assert not found[3][g == -torch.inf].any(), "a closed gate learns"


def test_what_has_faded_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ALiBi's slopes a tile reads a few hundred keys, wherever it stands; a key whose score is
    high enough to come back is read, however far; what causes no gate is read whole."""
    read: list[int] = []
    make = row_tiles.row_tiles

    def noting(*given: Any) -> Any:
        for tile in make(*given):
            read.append(tile.shape[2])
            yield tile

    monkeypatch.setattr(row_tiles, "row_tiles", noting)
    situation = Situation(2000, 2000, heads=1, kv_heads=1, batch=1)
    *qkv, upstream = tensors(situation)
    q, k, v = qkv
    slope = torch.full((1, 1, 2000), -0.25)
    attn, whole = (attnzoo.build("forgetting", 1, 8, backend=one) for one in ("tiles", "sdpa"))

    def same(k: Tensor, slope: Tensor, dtype: torch.dtype, tolerance: float) -> None:
        leaves = [x.clone().to(dtype).requires_grad_() for x in (q, k, v, slope)]
        answers = []
        for one in (attn, whole):
            out = one(*leaves[:3], log_decay=leaves[3], is_causal=True)
            answers.append((out, *torch.autograd.grad(out, leaves, upstream.to(dtype))))
        for x, y in zip(*answers, strict=True):
            close(x, y, tolerance, "rows and gradients")

    same(k, slope, torch.float32, 64 * 2**-24)
    assert max(read) < 400
    same(k, slope, torch.float64, 1e-12)
    assert max(read) < 500
    read.clear()
    loud = k.clone()
    loud[:, :, 100] *= 100.0  # its scores reach about 150, which 600 tokens of -0.25 take away
    same(loud, slope, torch.float64, 1e-12)
    assert max(read) > 1000
    read.clear()
    same(k, slope * 1e-4, torch.float32, 64 * 2**-24)
    assert max(read) == 2000


def test_many_faded_keys_still_count() -> None:
    """Where a bound is tight: keys that weigh e^-32.5 each, and a tile of rows whose own tokens are
    padding, so that their sums may be as small as scores can make them."""
    attn = attnzoo.build("forgetting", 1, 1, scale=1.0, backend="tiles")
    ones, first = torch.ones(1, 1, 2000, 1, dtype=torch.float64), 2000 // 128 * 128
    v, log_decay = ones.clone(), 0 * ones[..., 0]
    v[:, :, first:], log_decay[..., first] = 0.0, -32.5
    out = attn(ones, ones, v, log_decay=log_decay, is_causal=True)
    far = first * torch.tensor(-32.5).double().exp()
    assert abs(out[0, 0, first, 0] / far - 1) < 1e-9

    q, k, v = 50 * ones[:, :, :300], -ones[:, :, :300], torch.randn(1, 1, 300, 1).double()
    k[:, :, 0] = 1.0
    log_decay = torch.zeros(1, 1, 300).double()
    log_decay[..., 1] = -99.0
    mask = torch.arange(300)[None] < 250
    how: Any = {"log_decay": log_decay, "key_mask": mask, "is_causal": True}
    expected, _ = ORACLES["forgetting"](q, k, v, scale=1.0, **how)
    close(attn(q, k, v, **how), expected, 1e-12, "rows")


def test_sums_of_a_million_tokens() -> None:
    """The last row's weights of near and far keys, exact to float32 of their differences; a gate of
    the lowest number takes no digits from those behind it."""
    n = 1_000_000
    q, k = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, n, 1)
    log_decay = torch.full((1, 1, n), -1e-6)
    log_decay[..., : n // 2] = -3.0
    log_decay[..., n // 4] = torch.finfo(torch.float32).min
    a = attnzoo.build("forgetting", 1, 1).weights(q, k, log_decay=log_decay, is_causal=True)
    row, gate = a[0, 0, 0].double(), float(log_decay[0, 0, -1])
    distances = torch.arange(n // 2).double()  # to the last token
    expected = (gate * distances).exp()
    total = expected.sum() + expected[-1] * (torch.arange(1, 9) * -3.0).double().exp().sum()
    close(row.flip(0)[: n // 2] * n, expected / total * n, 64 * 2**-24, "weights")
    assert not row[: n // 4].any()


def test_without_gates_it_is_softmax() -> None:
    q, k, v, _ = tensors(Situation(70, 70))
    mask = padding("interior", 2, 70)
    attn, exact = attnzoo.build("forgetting", 4, 8), attnzoo.build("standard", 4, 8)
    masks: Any = {"key_mask": mask, "is_causal": True}
    assert torch.equal(attn(q, k, v, **masks), exact(q, k, v, **masks))
    assert attn.last_backend == "sdpa"
    attn.backend = "tiles"
    with pytest.raises(attnzoo.UnsupportedError, match="without log_decay it is softmax"):
        attn(q, k, v, **masks)


def test_gates_that_begin_later_and_grow_more_precise() -> None:
    """A state keeps a gate for every token, also of steps that brought none or coarser ones."""
    q, k, v, _ = tensors(Situation(30, 30))
    g = gates(Situation(30, 30), "fast").round(decimals=1)
    g[:, :, :10] = 0.0
    expected, _ = ORACLES["forgetting"](q, k, v, log_decay=g.bfloat16().double(), is_causal=True)
    attn = attnzoo.build("forgetting", 4, 8)
    state, rows = attn.init_state(2, kv_heads=2, dtype=q.dtype), []
    for start, end in ((0, 10), (10, 20), (20, 21), (21, 30)):
        here = slice(start, end)
        given: dict[str, Any] = {"log_decay": g[:, :, here].bfloat16()} if start else {}
        if start == 20:
            given["log_decay"] = given["log_decay"].double()
        out, state = attn.step(q[:, :, here], k[:, :, here], v[:, :, here], state, **given)
        rows.append(out)
    close(torch.cat(rows, 2), expected, 1e-12, "rows")


@pytest.mark.slow
def test_flash_linear_attention_says_the_same() -> None:
    naive = pytest.importorskip("fla.ops.forgetting_attn.naive", exc_type=ImportError)
    q, k, v, _ = (x.float() for x in tensors(Situation(70, 70)))
    g = gates(Situation(70, 70), "fast").float()
    theirs = naive.naive_forgetting_attn(*(x.transpose(1, 2) for x in (q, k, v, g)))
    attn = attnzoo.build("forgetting", 4, 8)
    close(attn(q, k, v, log_decay=g, is_causal=True), theirs.transpose(1, 2), 2e-5, "rows")
