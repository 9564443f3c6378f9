"""Windows about as wide as the sequence, and blocks as many as it has: never more than exact
attention, and that itself where nothing is hidden."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, Situation, close, gradients_of, padding, tensors
from stages import in_turn

import attnzoo
from attnzoo.engines.sparse import dense
from attnzoo.engines.sparse.patterns.block_patterns import GlobalBlocks
from attnzoo.engines.sparse.patterns.grid import Grid
from attnzoo.engines.sparse.sparse import Sparse

pytest.importorskip("fvcore")
from test_counting import agree

N = 700
WIDTHS = [300, 512, 650, N - 1, N, 2 * N]
DIRECTION = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


@pytest.mark.parametrize(
    ("window", "padded", "is_causal", "options"),
    in_turn(
        [(width, padded, way) for width in WIDTHS for padded in (0, 1) for way in (False, True)],
        [{}, {"sinks": 3}, {"sink_logits": True}],
    ),
)
def test_equals_the_reference(
    options: dict[str, object], window: int, padded: bool, is_causal: bool
) -> None:
    q, k, v, upstream = tensors(Situation(N, N, batch=1, heads=2, kv_heads=1))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask = padding("interior", 1, N) if padded else None
    outs, gradients = [], []
    for backend in ("auto", "reference"):
        attn = Case("sliding_window", {"window": window, **options}).build(
            2, dtype=torch.float64, backend=backend
        )
        outs.append(attn(q, k, v, key_mask=mask, is_causal=is_causal))
        gradients.append(gradients_of(outs[-1], upstream, *leaves))
    close(outs[0], outs[1], 1e-10, "output")
    for name, found, wanted in zip("qkv", *gradients, strict=True):
        close(found, wanted, 1e-10, f"gradient of {name}")


@DIRECTION
@pytest.mark.parametrize("window", WIDTHS)
def test_counts_agree(window: int, is_causal: bool) -> None:
    agree(Case("sliding_window", {"window": window}), is_causal, N, N)
    agree(Case("longformer", {"window": window}), is_causal, N, N)


@DIRECTION
@pytest.mark.parametrize("n", [64, 300, 700, 1024, 4096])
def test_never_more_than_exact(n: int, is_causal: bool) -> None:
    """The diagonal is computed in blocks, which exact attention's own kernel does not count, so up
    to one a row is granted."""
    exact = Case("standard").build(1).cost(1, n, is_causal=is_causal)
    counts = []
    for window in (n // 8, n // 4, n // 2, 3 * n // 4, n - 1, n, 2 * n):
        cost = Case("sliding_window", {"window": window}).build(1).cost(1, n, is_causal=is_causal)
        assert cost.support_macs <= cost.kernel_macs <= cost.macs <= exact.macs
        if n >= 700:
            assert cost.kernel_macs <= exact.kernel_macs + 2 * 8 * n * 64
        counts.append(cost.support_macs)
    assert counts == sorted(counts)


@DIRECTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sliding_window", {"window": N}),
        ("longformer", {"window": N}),
        ("bigbird", {"block_size": 128}),
    ],
    ids=str,
)
def test_what_hides_nothing_is_exact_attention(
    name: str, options: dict[str, object], dtype: torch.dtype, is_causal: bool
) -> None:
    q, k, v, _ = (x.to(dtype) for x in tensors(Situation(N, N)))
    attn, exact = (
        attnzoo.build(one, heads=4, head_dim=8, **more)
        for one, more in ((name, options), ("standard", {}))
    )
    assert torch.equal(attn(q, k, v, is_causal=is_causal), exact(q, k, v, is_causal=is_causal))
    found, wanted = (
        one.cost(2, N, kv_heads=2, is_causal=is_causal, dtype=dtype) for one in (attn, exact)
    )
    # A window's state has reached its bound.
    assert found == replace(wanted, state_growth=found.state_growth)
    assert found.kernel_macs == found.support_macs


@pytest.mark.parametrize("options", [{"window": N}, {"window": N - 3, "sinks": 3}], ids=str)
def test_the_last_row_of_a_window_is_exact_attention(options: dict[str, object]) -> None:
    """So that a step of decoding, whose state holds the window and the sinks alone, is one call of
    SDPA."""
    q, k, v, _ = tensors(Situation(1, N, kv_heads=2))
    mask = padding("left", 2, N)
    window, exact = (
        attnzoo.build(name, heads=4, head_dim=8, **more)
        for name, more in (("sliding_window", options), ("standard", {}))
    )
    assert torch.equal(window(q, k, v, is_causal=True), exact(q, k, v, is_causal=True))
    close(
        window(q, k, v, key_mask=mask, is_causal=True),
        exact(q, k, v, key_mask=mask, is_causal=True),
        1e-6,
        "padded",
    )
    costs = [attn.cost(2, 1, N, kv_heads=2, is_causal=True) for attn in (window, exact)]
    assert costs[0] == replace(costs[1], state_growth=0)


@DIRECTION
@pytest.mark.parametrize("slots", [0, dense.LARGEST_MASK], ids=["no dense mask", ""])
@pytest.mark.parametrize(
    ("name", "options"),
    [("sliding_window", {"window": N}), ("bigbird", {"block_size": 128})],
    ids=str,
)
def test_padding_leaves_it_exact_attention(
    name: str,
    options: dict[str, object],
    slots: int,
    is_causal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a mask of padding and causality would be too large to be made."""
    monkeypatch.setattr(dense, "LARGEST_MASK", slots)
    q, k, v, _ = tensors(Situation(N, N))
    mask = padding("interior", 2, N)
    attn, exact = (
        attnzoo.build(one, heads=4, head_dim=8, **more)
        for one, more in ((name, options), ("standard", {}))
    )
    close(
        attn(q, k, v, key_mask=mask, is_causal=is_causal),
        exact(q, k, v, key_mask=mask, is_causal=is_causal),
        1e-6,
        "output",
    )


def test_one_block_more_hides_something() -> None:
    """Of the blocks of 128 tokens each row lists eight at most, and the second row seven."""
    engine = attnzoo.build("bigbird", heads=4, head_dim=8, block_size=128).engine
    assert isinstance(engine, Sparse)
    pattern = engine.pattern
    assert [
        pattern.hides_nothing(Grid(4, 128 * count, 128 * count, False)) for count in (5, 6, 8, 9)
    ] == [True, True, False, False]


@DIRECTION
def test_what_a_pattern_hides_is_found_out_whatever_the_default_device(is_causal: bool) -> None:
    engine = attnzoo.build("bigbird", heads=4, head_dim=8, block_size=128, seed=7).engine
    assert isinstance(engine, Sparse)
    with torch.device("meta"):
        assert engine.pattern.hides_nothing(Grid(4, 600, 600, is_causal))


def test_a_block_that_does_not_see_itself_is_hidden() -> None:
    twice = GlobalBlocks(1, 4) | GlobalBlocks(1, 4)
    assert not twice.hides_nothing(Grid(1, 8, 8, True))
