"""Biases by distance and soft-capped scores: every variant that takes them, every backend, against
the oracle; decoding, packing, transforms; what makes such biases; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, Situation, ask_oracle, close, takes, tensors
from stages import in_turn, only
from torch import Tensor
from torch.func import functional_call, grad, vmap

import attnzoo
from attnzoo import UnsupportedError, distance_biases
from attnzoo.engines.softmax import rows

CASES = [
    Case("standard"),
    Case("standard", {"softcap": 2.0}),
    Case("flash", {"block_size": 20}),
    Case("flash", {"block_size": 64, "softcap": 2.0}),
    Case("sliding_window", {"window": 16}),
    Case("sliding_window", {"window": 90, "softcap": 2.0}),
    Case("sliding_window", {"window": 7, "dilation": 2}),
    Case("sliding_window", {"window": 5, "dilation": 3, "sinks": 4}),
    Case("sliding_window", {"window": 9, "sinks": 2, "sink_logits": True}),
    Case("longformer", {"window": 9, "global_tokens": 3}),
    Case("longformer", {"window": 5, "dilation": 2, "global_tokens": 2, "softcap": 2.0}),
    Case("bigbird", {"block_size": 8, "num_random_blocks": 2}),
    Case("bigbird", {"block_size": 5, "num_random_blocks": 1, "softcap": 2.0}),
    Case("sigmoid"),
]
USUAL = [CASES[i] for i in (0, 2, 4, 7, 9, 11)]
SITUATIONS = [
    Situation(150, 150, batch=1, heads=2, kv_heads=1),
    Situation(63, 63, "left", heads=2, kv_heads=1),
    Situation(83, 83, "interior", heads=2, kv_heads=2),
    Situation(40, 83, "right", kv_heads=1),
    Situation(1, 40),
]


def table(heads: int, reach: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(heads, 2 * reach + 1, generator=generator, dtype=torch.float64)


def backends(attn: attnzoo.Attention, *qkv: Tensor, **call: object) -> list[str]:
    """Those that take the call; at least one of them is fast."""
    found = [name for name in attn.engine.backend_names() if takes(attn, name, *qkv, **call)]  # type: ignore[arg-type]
    assert len(found) > 1 and "reference" in found
    return found


@pytest.mark.parametrize(
    ("is_causal", "case", "situation"),
    in_turn([(way, case) for way in (True, False) for case in CASES], SITUATIONS),
)
def test_outputs_weights_and_gradients_are_the_oracles(
    is_causal: bool, case: Case, situation: Situation
) -> None:
    q, k, v, upstream = tensors(situation)
    bias = table(situation.heads, 160)
    masks = {"key_mask": situation.key_mask(), "is_causal": is_causal}
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]
    attn = case.build(situation.heads, dtype=torch.float64)
    out, weights = ask_oracle(attn, q, k, v, options=case.options, distance_bias=bias, **masks)
    expected = torch.autograd.grad(out, leaves, upstream)
    torch.testing.assert_close(attn.weights(q, k, distance_bias=bias, **masks), weights)
    for given, count in ((bias, 4), (bias.detach(), 3)):  # learned, and fixed
        for backend in backends(attn, q, k, v, distance_bias=given, **masks):
            attn.backend = backend
            found = attn(q, k, v, distance_bias=given, **masks)
            assert attn.last_backend == backend
            torch.testing.assert_close(found, out, rtol=0, atol=1e-12)
            gradients = torch.autograd.grad(found, leaves[:count], upstream)
            torch.testing.assert_close(gradients, expected[:count], rtol=0, atol=1e-11)
            with torch.no_grad():
                without = attn(q, k, v, distance_bias=given, **masks)
            torch.testing.assert_close(without, out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decoding_in_pieces_equals_the_causal_rows(case: Case, padded: bool) -> None:
    q, k, v, _ = tensors(Situation(60, 60))
    mask = Situation(60, 60, "left").key_mask() if padded else None
    bias, attn = table(4, 59), case.build(dtype=torch.float64)
    whole = attn(q, k, v, key_mask=mask, is_causal=True, distance_bias=bias)
    state = attn.init_state(2, kv_heads=2, dtype=torch.float64)
    found = []
    for part in (
        slice(0, 25),
        slice(25, 26),
        slice(26, 50),
        *(slice(t, t + 1) for t in range(50, 60)),
    ):
        own = None if mask is None else mask[:, part]
        out, state = attn.step(
            q[:, :, part], k[:, :, part], v[:, :, part], state, key_mask=own, distance_bias=bias
        )
        found.append(out)
    real = slice(None) if mask is None else mask.nonzero(as_tuple=True)
    found = torch.cat(found, 2)
    if mask is None:
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)
    else:
        found, whole = (x.transpose(1, 2)[real] for x in (found, whole))
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("case", USUAL, ids=str)
def test_distances_in_a_packed_row_are_those_in_the_pieces(case: Case, is_causal: bool) -> None:
    q, k, v, _ = tensors(Situation(60, 60))
    ids = torch.tensor([[0] * 20 + [1] * 33 + [0] * 7, [5] * 1 + [4] * 59])
    bias, attn = table(4, 59), case.build(dtype=torch.float64)
    out, _ = ask_oracle(
        attn, q, k, v, options=case.options, distance_bias=bias, is_causal=is_causal, segments=ids
    )
    found = attn(q, k, v, is_causal=is_causal, segments=ids, distance_bias=bias)
    torch.testing.assert_close(found, out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", only(USUAL[::2], USUAL))
def test_transforms_and_graphs_follow_the_bias(case: Case) -> None:
    q, k, v, _ = tensors(Situation(40, 40))
    biases, attn = torch.stack([table(4, 39), -table(4, 39)]), case.build(dtype=torch.float64)

    def total(bias: Tensor) -> Tensor:
        return functional_call(attn, {}, (q, k, v), {"distance_bias": bias}).square().sum()

    found = vmap(grad(total))(biases)
    for own, bias in zip(found, biases, strict=True):
        leaf = bias.clone().requires_grad_()
        (expected,) = torch.autograd.grad(total(leaf), leaf)
        torch.testing.assert_close(own, expected)
    compiled = torch.compile(total, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(biases[1]), total(biases[1]))


@pytest.mark.parametrize("case", only(USUAL[::3], USUAL))
def test_gradients_twice(case: Case) -> None:
    q, k, v, _ = (x[:1, :2, :9, :3].clone().requires_grad_() for x in tensors(Situation(9, 9)))
    bias = table(2, 8).requires_grad_()
    attn = attnzoo.build(case.variant, heads=2, head_dim=3, softcap=1.5, **case.options).double()

    def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attn(q, k, v, is_causal=True, distance_bias=bias)

    assert torch.autograd.gradcheck(forward, (q, k, v, bias))
    assert torch.autograd.gradgradcheck(forward, (q, k, v, bias), fast_mode=True)


@pytest.mark.parametrize("case", USUAL, ids=str)
def test_half_precision_keeps_a_bias_of_single(case: Case) -> None:
    """-37.3 would be -37.25 in bfloat16."""
    q, k, v, _ = (x.bfloat16() for x in tensors(Situation(70, 70)))
    bias = distance_biases.alibi(torch.tensor([0.5, 0.53, 0.7, 0.9]), 70)
    attn = case.build(dtype=torch.bfloat16)
    exact = case.build(dtype=torch.float64)
    expected = exact(*(x.double() for x in (q, k, v)), is_causal=True, distance_bias=bias.double())
    found = attn(q, k, v, is_causal=True, distance_bias=bias)
    reference = attn.weights(q, k, is_causal=True, distance_bias=bias)
    assert found.dtype == torch.bfloat16 and attn.last_backend != "sdpa"
    assert (found - expected).norm() / expected.norm() < 4e-3
    assert reference.dtype == torch.bfloat16


def test_the_bias_of_exact_attention_is_never_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients of the bias, SDPA reads a view of the table."""
    masks: list[Tensor] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def seen(*args: Tensor, **options: object) -> Tensor:
        masks.append(options["attn_mask"])  # type: ignore[arg-type]
        return sdpa(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    q, k, v, _ = tensors(Situation(64, 64))
    attn = attnzoo.build("standard", heads=4, head_dim=8)
    for is_causal in (True, False):
        attn(q, k, v, is_causal=is_causal, distance_bias=table(4, 63))
    assert [mask.shape for mask in masks] == [(1, 4, 64, 64)] * 2
    assert all(mask.untyped_storage().nbytes() <= 4 * 127 * 8 for mask in masks)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_a_few_rows_at_a_time_stand_where_they_stood(
    is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "SCORES", 2 * 4 * 50 * 16)
    situation = Situation(40, 50, "interior")
    q, k, v, _ = tensors(situation)
    attn = attnzoo.build("standard", heads=4, head_dim=8, softcap=2.0, backend="rows")
    call = {"key_mask": situation.key_mask(), "is_causal": is_causal, "distance_bias": table(4, 49)}
    found = attn(q, k, v, **call)
    attn.backend = "reference"
    torch.testing.assert_close(found, attn(q, k, v, **call), rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 4, 6, 12])
def test_alibi_is_that_of_bloom_and_mpt(heads: int) -> None:
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    mpt = pytest.importorskip("transformers.models.mpt.modeling_mpt")
    bias = distance_biases.alibi(distance_biases.alibi_slopes(heads), 6)
    from_bloom = bloom.build_alibi_tensor(torch.ones(1, 6), heads, torch.float32)
    from_first = bias[:, :6] - bias[:, :1]  # of the last row: BLOOM counts from the first key
    torch.testing.assert_close(from_first, from_bloom.view(heads, 6))
    torch.testing.assert_close(bias[:, :6], mpt.build_mpt_alibi_tensor(heads, 6).view(heads, 6))
    assert torch.equal(bias, bias.flip(1))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5s_buckets_are_those_of_transformers(bidirectional: bool) -> None:
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    weight, length = torch.randn(32, 3), 300
    bias = distance_biases.t5(weight, length, bidirectional=bidirectional, max_distance=100)
    buckets = modeling.T5Attention._relative_position_bucket(
        torch.arange(1 - length, length), bidirectional, 32, 100
    )
    assert torch.equal(bias, weight[buckets].T)


def test_a_clipped_table_repeats_its_ends() -> None:
    bias = distance_biases.clipped(torch.tensor([[1.0, 2.0, 3.0]]), 4)
    assert bias.tolist() == [[1, 1, 1, 2, 3, 3, 3]]


def test_bad_biases_are_refused_in_a_sentence() -> None:
    q, k, v, _ = tensors(Situation(9, 9))
    attn = attnzoo.build("standard", heads=4, head_dim=8)
    for bias, said in (
        (table(4, 7), r"reaches 7 positions.*keys 8 positions from a query.*at least 17 distances"),
        (table(4, 9)[:, 1:], r"has 18 distances; give an odd number"),
        (table(3, 8), r"shape \(3, 17\); it must be \(heads, distances\) = \(4, 17\)"),
        (table(4, 8)[0], r"shape \(17,\); it must be \(heads, distances\) = \(4, 2 · reach \+ 1\)"),
        (torch.zeros(4, 17, dtype=torch.long), "it must be floating"),
    ):
        with pytest.raises(ValueError, match=said):
            attn(q, k, v, distance_bias=bias)
        with pytest.raises(ValueError, match=said):
            attn.weights(q, k, distance_bias=bias)
    window = attnzoo.build("sliding_window", heads=4, head_dim=8, window=3)
    window(q, k, v, distance_bias=table(4, 2))
    with pytest.raises(ValueError, match=r"reaches 1 positions.*keys 2 positions"):
        window(q, k, v, distance_bias=table(4, 1))
    state = attn.init_state(2, kv_heads=2, dtype=torch.float64)
    first, then = (tuple(x.split([5, 4], 2)[i] for x in (q, k, v)) for i in (0, 1))
    _, state = attn.step(first[0], first[1], first[2], state, distance_bias=table(4, 5))
    with pytest.raises(ValueError, match=r"reaches 5 positions.*keys 8 positions"):
        attn.step(then[0], then[1], then[2], state, distance_bias=table(4, 5))
    with pytest.raises(UnsupportedError, match="linear has no place for distance_bias"):
        attnzoo.build("linear", heads=4, head_dim=8)(q, k, v, distance_bias=table(4, 8))


@pytest.mark.parametrize("softcap", [0, -1.0, float("inf"), float("nan"), "50", True])
def test_a_bad_softcap_is_refused(softcap: object) -> None:
    with pytest.raises(ValueError, match=r"softcap=.* must be a finite number above 0"):
        attnzoo.build("standard", heads=4, head_dim=8, softcap=softcap)


def test_bad_arguments_of_biases_are_refused() -> None:
    with pytest.raises(ValueError, match="heads=0"):
        distance_biases.alibi_slopes(0)
    with pytest.raises(ValueError, match=r"slopes is .*; give a floating tensor of shape \(heads"):
        distance_biases.alibi(torch.zeros(2, 3), 4)
    with pytest.raises(ValueError, match="length=0"):
        distance_biases.alibi(torch.zeros(2), 0)
    with pytest.raises(ValueError, match="max_distance=16 and 32 buckets leave none"):
        distance_biases.t5(torch.zeros(32, 2), 9, bidirectional=False, max_distance=16)
    with pytest.raises(ValueError, match="table has 4 distances; give an odd number"):
        distance_biases.clipped(torch.zeros(2, 4), 9)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sliding_window", {"window": 8, "sinks": 2}),
        ("longformer", {"window": 8, "global_tokens": 2}),
        ("sliding_window", {"window": 2, "sinks": 1}),
    ],
)
def test_a_state_beside_padding_needs_no_longer_table(name: str, options: dict[str, Any]) -> None:
    """Tokens that always stay stand in more slots than there are positions."""
    q, k, v = (torch.randn(1, 2, 8, 4, dtype=torch.float64) for _ in range(3))
    given: Any = {"distance_bias": torch.randn(2, 15, dtype=torch.float64)}
    key_mask = torch.tensor([[False] + [True] * 7])
    attn = attnzoo.build(name, heads=2, head_dim=4, **options)
    state, rows = attn.init_state(1, dtype=torch.float64), []
    for part in (slice(0, 4), slice(4, 5), slice(5, 8)):
        new_q, new_k, new_v = (x[:, :, part] for x in (q, k, v))
        out, state = attn.step(new_q, new_k, new_v, state, key_mask=key_mask[:, part], **given)
        rows.append(out)
    whole = attn(q, k, v, key_mask=key_mask, is_causal=True, **given)
    close(torch.cat(rows, 2), whole, 1e-12, "rows")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("standard", {}),
        ("flash", {}),
        ("sliding_window", {"window": 4}),
        ("longformer", {"window": 4}),
        ("bigbird", {"block_size": 5, "num_random_blocks": 1}),
    ],
)
def test_a_row_whose_keys_the_bias_hides_is_0(name: str, options: dict[str, Any]) -> None:
    bias = torch.zeros(1, 79)
    bias[:, 39] = -torch.inf  # a token's own key, the first row's only one
    x = torch.randn(1, 1, 40, 4)
    for backend in attnzoo.build(name, heads=1, head_dim=4, **options).engine.backend_names():
        attn, q = attnzoo.build(name, 1, 4, backend=backend, **options), x.clone().requires_grad_()
        try:
            out = attn(q, x, x, is_causal=True, distance_bias=bias)
        except UnsupportedError:
            continue
        assert not out[0, 0, 0].any() and bool(out.isfinite().all()), backend
        (gradient,) = torch.autograd.grad(out.sum(), q)
        assert bool(gradient.isfinite().all()), backend
