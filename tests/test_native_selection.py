"""Backend `native` of an indexer: compiled code chooses the blocks that float64 in torch chooses.
Where nothing can be compiled, `indexed` is tested without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.attention import Attention
from attnzoo.call import Call
from attnzoo.engines.native import library
from attnzoo.engines.sparse.selected.selection import Placed
from attnzoo.variants.selected import index_choice
from attnzoo.variants.selected.indexed import IndexedBlocks

pytestmark = pytest.mark.skipif(
    library.cannot_compile() is not None, reason=str(library.cannot_compile())
)
HEADS, WIDTH = 4, 16
CASES: dict[str, dict[str, Any]] = {
    "one index head": {"index_heads": 1},
    "more heads than vectors": {"index_heads": 6, "index_dim": 20, "top_k": 80},
    "by group": {"per_group": True, "index_key_heads": 2, "kv_heads": 2},
    "keys of pairs": {"index_key_heads": 2, "is_causal": False},
    "padded left": {"padding": "left"},
    "padded between": {"padding": "between", "is_causal": False},
    "more keys": {"queries": 90},
    "more queries": {"queries": 300},
    "odd blocks": {"block_size": 11, "top_k": 33},
    "bfloat16": {"dtype": torch.bfloat16},
    "own products": {"index_heads": None, "kv_heads": 2},
}


def call_of(
    *,
    length: int = 210,
    queries: int = 210,
    kv_heads: int = 4,
    is_causal: bool = True,
    padding: str | None = None,
    index_heads: int | None = 4,
    index_key_heads: int = 1,
    index_dim: int = 13,
    dtype: torch.dtype = torch.float32,
    block_size: int = 8,
    top_k: int = 48,
    per_group: bool = False,
) -> tuple[Attention, Call]:
    """Two samples; more than one tile of queries and chunk of keys, none of which is full."""
    attn = attnzoo.build(
        "indexed", HEADS, WIDTH, block_size=block_size, top_k=top_k, per_group=per_group
    )
    q = torch.randn(2, HEADS, queries, WIDTH)
    k, v = (torch.randn(2, kv_heads, length, WIDTH) for _ in "kv")
    inputs: dict[str, Tensor] = {}
    if index_heads is not None:
        inputs = {
            "q_index": torch.randn(2, index_heads, queries, index_dim, dtype=dtype),
            "k_index": torch.randn(2, index_key_heads, length, index_dim, dtype=dtype),
            "w_index": torch.randn(2, index_heads, queries, dtype=dtype),
        }
    mask = None
    if padding == "left":
        mask = torch.arange(length) >= torch.tensor([[70], [3]])
    if padding == "between":
        mask = torch.rand(2, length) < 0.7
    return attn, Call(
        q, k, v, key_mask=mask, is_causal=is_causal, inputs=inputs, declared=attn.spec.inputs
    )


def chosen(attn: Attention, call: Call, *, natively: bool) -> Tensor:
    assert isinstance(attn.engine, IndexedBlocks)
    selector, placed = attn.engine.selector, Placed.of(call)
    found = selector.select_natively(placed) if natively else selector.select(placed)
    return found.blocks.sort(-1).values


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_it_chooses_what_float64_does(case: dict[str, Any]) -> None:
    attn, call = call_of(**case)
    assert torch.equal(chosen(attn, call, natively=True), chosen(attn, call, natively=False))


def test_of_equal_scores_the_earlier_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights below 0 leave 0 as the best score of every block; rows are left to torch only where
    scores are no numbers."""
    attn, call = call_of(index_heads=1)
    call.inputs["w_index"].abs_().neg_()
    wanted = chosen(attn, call, natively=False)
    assert (wanted[0, 0, 100:] == torch.arange(6)).any(1).all()
    monkeypatch.setattr(index_choice.BlocksByIndex, "_exactly", None)
    assert torch.equal(chosen(attn, call, natively=True), wanted)


@pytest.mark.parametrize("factor", [1e-4, 1e-7, 0.0])
def test_scores_that_float32_cannot_tell_apart(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    attn, call = call_of()
    call.inputs["k_index"].mul_(factor).add_(1)
    call.inputs["q_index"].abs_()
    call.inputs["w_index"].abs_()
    wanted = chosen(attn, call, natively=False)
    monkeypatch.setattr(index_choice.BlocksByIndex, "_exactly", None)
    assert torch.equal(chosen(attn, call, natively=True), wanted)


def test_a_score_of_0_that_other_keys_of_the_block_exceed() -> None:
    """One long key makes float32 too coarse for the scores of all others."""
    attn, call = call_of(index_heads=1)
    q, k, w = call.inputs.values()
    for x in (q, k):
        x[..., 1:] = 0
    q[..., :2] = torch.tensor([1e-3, 1e3])
    k[:, :, 0, 1] = 1e3
    w.fill_(1)
    assert torch.equal(chosen(attn, call, natively=True), chosen(attn, call, natively=False))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 3e38])
def test_keys_that_are_no_numbers_or_too_large(wrong: float) -> None:
    attn, call = call_of()
    call.inputs["k_index"][0, 0, 120] = wrong
    assert torch.equal(chosen(attn, call, natively=True), chosen(attn, call, natively=False))


def test_rows_and_gradients_are_those_of_tiles() -> None:
    attn, call = call_of(padding="left")
    found = []
    for backend in ("native", "tiles"):
        attn.backend = backend
        q, k, v = (x.clone().requires_grad_() for x in (call.q, call.k, call.v))
        out = attn(q, k, v, key_mask=call.key_mask, is_causal=True, **call.inputs)
        assert attn.last_backend == backend
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_threads_change_no_choice() -> None:
    attn, call = call_of()
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(chosen(attn, call, natively=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_other_strides() -> None:
    attn, call = call_of(index_heads=3)
    strided = {name: x.mT.contiguous().mT for name, x in call.inputs.items()}
    other = Call(call.q, call.k, call.v, is_causal=True, inputs=strided, declared=call.declared)
    assert torch.equal(chosen(attn, call, natively=True), chosen(attn, other, natively=True))


def test_auto_takes_it_where_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    library.operators()

    def taken(**options: Any) -> str | None:
        attn, call = call_of(length=1100, queries=1100, **options)
        attn(call.q, call.k, call.v, is_causal=True, **call.inputs)
        return attn.last_backend

    assert taken() == "tiles"  # the tests' machine has not compiled it
    monkeypatch.setattr(library, "not_compiled", lambda: None)
    assert taken() == "native"
    assert taken(dtype=torch.float64) == "tiles"


def test_why_it_refuses() -> None:
    attn = attnzoo.build("indexed", HEADS, WIDTH, block_size=8, backend="native", top_k=8)
    q = torch.randn(1, HEADS, 1100, WIDTH, dtype=torch.float64)
    with pytest.raises(attnzoo.UnsupportedError, match="of float32, got"):
        attn(q, q, q, is_causal=True)
