"""What register_flop_counters teaches torch's counter and fvcore, against the closed forms."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, can, usual_cases
from small import of_each_family
from stages import only
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

import attnzoo

nn_of_fvcore = pytest.importorskip("fvcore.nn")
HEADS, HEAD_DIM, KV_HEADS, BATCH = 4, 8, 2, 2
WIDTH, LENGTH = 32, 20
aten = torch.ops.aten
#: A solver inverts triangles of 16, which the closed form counts as products that double them.
SOLVED = 16 * 16 * (16 - 1) // 2
DOUBLED = 16 * (16**2 - 1) // 3
#: Read which keys were chosen, and leave out products of others, by every backend of theirs.
ONLY_CHOSEN = ("nsa",)


@pytest.fixture
def taught() -> Iterator[attnzoo.FlopCounters]:
    with attnzoo.register_flop_counters() as told:
        yield told


def torch_macs(run: Any, *inputs: Any, learns: bool = False, **kwargs: Any) -> dict[Any, int]:
    """By operator. The counter's number is FLOPs."""
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(learns):
        out = run(*inputs, **kwargs)
        if learns:
            out.sum().backward()
    return {name: n // 2 for name, n in counter.get_flop_counts().get("Global", {}).items()}


def fvcore_macs(module: nn.Module, *inputs: Tensor) -> int:
    """fvcore's number is MACs."""
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return int(nn_of_fvcore.FlopCountAnalysis(module, inputs).total())


class Called(nn.Module):
    def __init__(self, module: nn.Module, **kwargs: Any) -> None:
        super().__init__()
        self.module, self.kwargs = module, kwargs

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.module(q, k, k, **self.kwargs)


def pairs(case: Case) -> list[tuple[bool, int, int]]:
    lengths = [(70, 70), (33, 70), (1, 65)]
    return [
        (way, *pair)
        for way in (False, True)
        if can(case.spec, way)
        for pair in lengths
        if pair[0] == pair[1] or case.spec.cross
    ]


FEW = [case for case in usual_cases() if case.variant in of_each_family()]


@pytest.mark.parametrize("case", only(FEW, usual_cases()))
def test_both_count_a_variant_as_its_closed_form(case: Case, taught: attnzoo.FlopCounters) -> None:
    """On numbers on the CPU, by the backend that the closed form counts, which is the one of the
    meta device."""
    attn = case.build(HEADS, HEAD_DIM)
    for is_causal, queries, keys in pairs(case):
        q, k = torch.randn(BATCH, HEADS, queries, HEAD_DIM), torch.randn(BATCH, KV_HEADS, keys, 8)
        closed = attn.cost(BATCH, queries, keys, kv_heads=KV_HEADS, is_causal=is_causal).macs
        assert fvcore_macs(Called(attn, is_causal=is_causal), q, k) == closed

        on_meta = case.build(HEADS, HEAD_DIM).to("meta")
        on_meta(q.to("meta"), *[k.to("meta")] * 2, is_causal=is_causal)
        for backend in ("auto", on_meta.last_backend):
            one = case.build(HEADS, HEAD_DIM, backend=backend)
            found = torch_macs(one, q, k, k, is_causal=is_causal)
            solved = found.pop(aten.linalg_solve_triangular, 0)
            assert solved % SOLVED == 0
            total = sum(found.values()) + solved // SOLVED * DOUBLED
            if backend == "auto" or case.variant in ONLY_CHOSEN:
                assert 0.9 * closed < total <= closed, one.last_backend
            else:
                assert total == closed, one.last_backend


def test_attention_on_a_cpu(taught: attnzoo.FlopCounters) -> None:
    """Forward, and backward as torch counts it elsewhere: five products for the forward's two."""
    q = torch.randn(BATCH, HEADS, LENGTH, HEAD_DIM, requires_grad=True)
    k, v = (torch.randn(BATCH, KV_HEADS, 30, HEAD_DIM, requires_grad=True) for _ in "kv")
    product = BATCH * HEADS * LENGTH * 30 * HEAD_DIM
    macs = torch_macs(F.scaled_dot_product_attention, q, k, v, enable_gqa=True)
    assert macs == {aten._scaled_dot_product_flash_attention_for_cpu: 2 * product}
    both = torch_macs(F.scaled_dot_product_attention, q, k, v, enable_gqa=True, learns=True)
    assert sum(both.values()) == 7 * product


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_torch_layers_in_evaluation(
    learns: bool, need_weights: bool, taught: attnzoo.FlopCounters
) -> None:
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    x = torch.randn(BATCH, LENGTH, WIDTH)
    expected = BATCH * (4 * LENGTH * WIDTH**2 + 2 * LENGTH**2 * WIDTH)
    with torch.set_grad_enabled(learns):
        assert sum(torch_macs(layer, x, x, x, need_weights=need_weights).values()) == expected
        assert fvcore_macs(Called(layer, need_weights=need_weights), x, x) == expected


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_fused_encoder(taught: attnzoo.FlopCounters) -> None:
    """Padding is left out of nested tensors, and of their count."""
    inner = 3 * WIDTH
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, inner, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(BATCH, LENGTH, WIDTH)
    padding = torch.arange(LENGTH) >= torch.tensor([[LENGTH - 6], [LENGTH]])

    def expected(*lengths: int) -> int:
        per_token = 4 * WIDTH**2 + 2 * WIDTH * inner
        return 2 * sum(n * per_token + 2 * n * n * WIDTH for n in lengths)

    assert sum(torch_macs(encoder, x).values()) == expected(LENGTH, LENGTH)
    padded = torch_macs(encoder, x, src_key_padding_mask=padding)
    assert padded == {aten._transformer_encoder_layer_fwd: expected(LENGTH - 6, LENGTH)}
    norms = 2 * 2 * 5 * BATCH * LENGTH * WIDTH  # which fvcore adds to products
    with torch.no_grad():
        assert fvcore_macs(encoder, x) == expected(LENGTH, LENGTH) + norms


def test_products_in_place_and_of_vectors(taught: attnzoo.FlopCounters) -> None:
    a, b, x = torch.randn(3, 5), torch.randn(5, 7), torch.randn(5)
    added, batched = torch.randn(3, 7), torch.randn(2, 3, 7)
    assert torch_macs(added.addmm_, a, b) == {aten.addmm_: 105}
    assert torch_macs(batched.baddbmm_, a.expand(2, 3, 5), b.expand(2, 5, 7)) == {
        aten.baddbmm_: 210
    }
    assert torch_macs(torch.mv, a, x) == {aten.mv: 15}
    assert torch_macs(torch.addmv, torch.randn(3), a, x) == {aten.addmv: 15}
    assert torch_macs(torch.randn(3).addmv_, a, x) == {aten.addmv_: 15}


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize(("unit", "macs"), [(True, 2 * 6 * 9), (False, 2 * 10 * 9)])
def test_a_triangular_solve(
    left: bool, unit: bool, macs: int, taught: attnzoo.FlopCounters
) -> None:
    """Row i of 4 takes i products, and one more where it divides by the diagonal; 9 columns, two
    matrices."""
    a = torch.eye(4).expand(2, 4, 4)
    b = torch.randn(2, *((4, 9) if left else (9, 4)))
    found = torch_macs(
        torch.linalg.solve_triangular, a, b, upper=False, left=left, unitriangular=unit
    )
    assert found == {aten.linalg_solve_triangular: macs}


def test_twice_is_once_and_revoking_leaves_nothing() -> None:
    fvcore_knows = sys.modules["fvcore.nn.flop_count"]._DEFAULT_SUPPORTED_OPS
    before = dict(flop_counter.flop_registry), dict(fvcore_knows)
    q = torch.randn(1, 1, 4, 8)
    told = attnzoo.register_flop_counters()
    try:
        assert attnzoo.register_flop_counters() is told
        registry = flop_counter.flop_registry
        new = {str(name) for name in registry if name not in before[0]}
        assert new == set(told.changed["torch"])
        assert all(registry[name] is one for name, one in before[0].items())
        other = {name for name, one in fvcore_knows.items() if before[1].get(name) is not one}
        assert other == set(told.changed["fvcore"])
        assert "fvcore" in str(told) and "flash_attention_for_cpu" in str(told)
    finally:
        told.revoke()
    told.revoke()
    assert (dict(flop_counter.flop_registry), dict(fvcore_knows)) == before
    assert torch_macs(F.scaled_dot_product_attention, q, q, q) == {}
    again = attnzoo.register_flop_counters()
    assert again is not told and again.changed == told.changed
    told.revoke()  # an old one takes nothing back of a new one
    assert attnzoo.register_flop_counters() is again
    assert torch_macs(F.scaled_dot_product_attention, q, q, q)
    again.revoke()


def test_what_others_taught_before_stays() -> None:
    """An operator that torch's counter knows by then is left as it is."""
    flop_counter.register_flop_formula(aten.mv)(lambda *shapes, **_: 10)
    try:
        with attnzoo.register_flop_counters() as told:
            assert "aten.mv" not in told.changed["torch"]
            assert torch_macs(torch.mv, torch.eye(3), torch.zeros(3)) == {aten.mv: 5}
        assert aten.mv in flop_counter.flop_registry
    finally:
        del flop_counter.flop_registry[aten.mv]


def test_without_fvcore_torch_is_taught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    with attnzoo.register_flop_counters() as told:
        assert list(told.changed) == ["torch"]
