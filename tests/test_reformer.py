"""Reformer beyond the rules: determinism, recall and hash rounds, its limits, shared queries and
keys."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import FEW_SITUATIONS, Situation, close, gradients_of, padding, tensors
from torch import Tensor

import attnzoo
from attnzoo.attention import Attention
from attnzoo.oracles import reformer
from attnzoo.variants.reformer.angular_hash import AngularHash

SMALL = {"num_buckets": 6, "num_hashes": 3, "chunk_size": 5}


def build(**options) -> Attention:
    return attnzoo.build("reformer", heads=4, head_dim=8, **{**SMALL, **options}).double()


def support(attn: Attention, q: Tensor, k: Tensor, **masks) -> Tensor:
    return attn.weights(q, k, **masks) != 0


def test_one_bucket_and_a_chunk_as_long_as_the_input_is_exact_attention():
    attn = build(num_buckets=1, num_hashes=1, chunk_size=60)
    exact = attnzoo.build("standard", heads=4, head_dim=8).double()
    q, k, v, _ = tensors(Situation(60, 60))
    for is_causal in (False, True):
        close(
            attn(q, k, v, is_causal=is_causal),
            exact(q, k, v, is_causal=is_causal),
            1e-12,
            "one bucket",
        )


def test_one_bucket_is_a_window_of_chunks():
    attn = build(num_buckets=1, num_hashes=2, chunk_size=5)
    q, k, _, _ = tensors(Situation(23, 23))
    i, j = torch.arange(23)[:, None] // 5, torch.arange(23) // 5
    assert torch.equal(support(attn, q, k), ((i - j).abs() <= 1).expand(2, 4, -1, -1))
    causal = ((i - j >= 0) & (i - j <= 1)).tril()
    assert torch.equal(support(attn, q, k, is_causal=True), causal.expand(2, 4, -1, -1))


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_more_rounds_see_more_and_never_less(is_causal: bool):
    """The first rounds of a longer draw are those of a shorter one, so the supports are nested, and
    the top key is found more often."""
    q, k, _, _ = tensors(Situation(200, 200, kv_heads=4))
    scores = q @ k.mT
    top = (
        scores.masked_fill(~torch.ones(200, 200, dtype=torch.bool).tril(), float("-inf"))
        if is_causal
        else scores
    ).argmax(-1, keepdim=True)
    many = build(num_hashes=16, num_buckets=8, chunk_size=16)
    before, recalls = torch.zeros(2, 4, 200, 200, dtype=torch.bool), []
    for rounds in (1, 4, 16):
        few = build(num_hashes=rounds, num_buckets=8, chunk_size=16)
        few.engine.hashing.rotations.copy_(many.engine.hashing.rotations[:rounds])  # type: ignore[union-attr]
        seen = support(few, q, k, is_causal=is_causal)
        assert bool((seen | ~before).all())
        recalls.append(seen.gather(-1, top).double().mean().item())
        before = seen
    assert recalls[0] + 0.1 < recalls[1] < recalls[2] - 0.05


def test_the_nearest_direction_shares_a_bucket_more_often():
    """Angular hashing: the collision rate falls with the angle."""
    generator = torch.Generator().manual_seed(0)
    hashing = AngularHash(16, 8, 400, seed=1)
    x, y = torch.randn(2, 50, 16, generator=generator)
    rates = [
        (hashing(x) == hashing(x + far * y)).double().mean().item() for far in (0.0, 0.3, 1.0, 4.0)
    ]
    assert rates[0] == 1.0 > rates[1] > rates[2] > rates[3]
    assert rates[3] > 1 / 8 - 0.02 and bool((hashing(-x) != hashing(x)).all())


def test_a_draw_is_kept_saved_and_repeated():
    first, same, other = build(seed=1), build(seed=1), build(seed=2)
    assert torch.equal(
        first.state_dict()["engine.hashing.rotations"],
        same.state_dict()["engine.hashing.rotations"],
    )
    q, k, v, _ = tensors(Situation(90, 90))
    out = first(q, k, v)
    assert not torch.equal(out, other(q, k, v))
    other.load_state_dict(first.state_dict())
    assert torch.equal(out, other(q, k, v))
    assert torch.equal(out, first.train()(q, k, v)) and torch.equal(out, first.eval()(q, k, v))
    torch.manual_seed(0)
    first.redraw()  # type: ignore[operator]
    torch.manual_seed(0)
    same.redraw()  # type: ignore[operator]
    assert torch.equal(first(q, k, v), same(q, k, v)) and not torch.equal(out, first(q, k, v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_module_keeps_every_bucket(dtype: torch.dtype):
    hashing, x = AngularHash(64, 64, 4, seed=0), torch.randn(3, 500, 64).to(dtype)
    buckets = hashing(x)
    assert torch.equal(copy.deepcopy(hashing).to(dtype)(x), buckets)
    assert torch.equal(hashing.double()(x.double()), buckets)
    assert torch.equal(torch.cat([hashing(x[:, i : i + 1]) for i in range(500)], -1), buckets)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "situation", [s for s in FEW_SITUATIONS if s.query_length == s.key_length], ids=str
)
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_shared_queries_and_keys(backend: str, situation: Situation, is_causal: bool):
    """The oracle's rule: keys of length 1, a token sees itself only where it sees nothing else."""
    attn = attnzoo.build(
        "reformer", heads=situation.heads, head_dim=8, **SMALL, share_qk=True, backend=backend
    ).double()
    q, _, _, grad = tensors(situation)
    v = tensors(
        Situation(
            situation.query_length,
            situation.key_length,
            batch=situation.batch,
            heads=situation.heads,
            kv_heads=situation.heads,
        )
    )[2]
    inputs = (q.requires_grad_(), v.requires_grad_())
    masks = {"key_mask": situation.key_mask(), "is_causal": is_causal}
    rotations = attn.engine.hashing.rotations  # type: ignore[union-attr]
    expected, a = reformer(
        q, q, v, rotations=rotations, num_buckets=6, chunk_size=5, share_qk=True, **masks
    )
    out = attn(q, q, v, **masks)
    close(out, expected, 1e-10, "output")
    close(attn.weights(q, q, **masks), a, 1e-10, "weights")
    for actual, wanted in zip(
        gradients_of(out, grad, *inputs), gradients_of(expected, grad, *inputs), strict=True
    ):
        close(actual, wanted, 1e-10, "gradient")


def test_a_shared_token_sees_itself_only_if_nothing_else():
    a = build(share_qk=True, num_buckets=64, num_hashes=1)
    q, _, _, _ = tensors(Situation(40, 40))
    for is_causal in (False, True):
        seen = support(a, q, q, is_causal=is_causal)
        itself = seen.diagonal(dim1=-2, dim2=-1)
        assert bool(itself.any()) and not bool(itself.all())
        assert bool((seen.sum(-1)[itself] == 1).all()) and bool((seen.sum(-1) > 0).all())


def test_shared_decoding_equals_a_forward():
    attn = build(share_qk=True)
    q, v = tensors(Situation(50, 50))[0], tensors(Situation(50, 50, kv_heads=4))[2]
    state, rows = attn.init_state(2, dtype=q.dtype), []
    for part, values in zip(q.split([20, 1, 1, 28], 2), v.split([20, 1, 1, 28], 2), strict=True):
        out, state = attn.step(part, part, values, state)
        rows.append(out)
    close(torch.cat(rows, 2), attn(q, q, v, is_causal=True), 1e-10, "rows in pieces")


def test_autocast_leaves_a_shared_tensor_shared():
    attn = attnzoo.build("reformer", heads=4, head_dim=8, **SMALL, share_qk=True)
    q, v = torch.randn(2, 1, 4, 30, 8).unbind()
    half = q.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = attn(q, q, v)
    assert torch.equal(out, attn(half, half, v.bfloat16()))


def test_what_is_not_shared_is_refused():
    attn = build(share_qk=True)
    q, v = tensors(Situation(9, 9))[0], tensors(Situation(9, 9, kv_heads=4))[2]
    for call in (
        lambda: attn(q, q.clone(), v),
        lambda: attn(q[:, :, 1:], q, v),
        lambda: attn.step(q, q.clone(), v, attn.init_state(2, dtype=q.dtype)),
    ):
        with pytest.raises(
            attnzoo.UnsupportedError, match=r"share_qk=True.*same tensor.*share_qk=False"
        ):
            call()


@pytest.mark.parametrize("kind", ["left", "interior"])
def test_padding_anywhere_equals_leaving_the_tokens_out(kind: str):
    """Ranks count real tokens only."""
    attn, mask = build(), padding(kind, 1, 50)
    q, k, v, _ = tensors(Situation(50, 50, batch=1))
    assert mask is not None
    some = mask[0]
    for is_causal in (False, True):
        padded = attn(q, k, v, key_mask=mask, is_causal=is_causal)[:, :, some]
        close(
            padded,
            attn(q[:, :, some], k[:, :, some], v[:, :, some], is_causal=is_causal),
            1e-12,
            "real rows",
        )


@pytest.mark.parametrize("shared", ["queries", "keys", "both"])
def test_everything_in_one_bucket(shared: str):
    """The worst cases of the layout: one direction for all queries, all keys, or both."""
    q, k, v, _ = tensors(Situation(150, 150))
    q = q[:, :, :1].expand_as(q) if shared != "keys" else q
    k = k[:, :, :1].expand_as(k) if shared != "queries" else k
    for is_causal in (False, True):
        close(
            build(backend="chunked")(q, k, v, is_causal=is_causal),
            build(backend="reference")(q, k, v, is_causal=is_causal),
            1e-12,
            shared,
        )


def test_macs_grow_with_the_length():
    """Eight times the tokens cost eight times the products, once every bucket holds a chunk."""
    attn = attnzoo.build("reformer", heads=1, head_dim=64)
    small, large = attn.cost(1, 2**14, is_causal=True), attn.cost(1, 2**17, is_causal=True)
    assert 6.0 < large.macs / small.macs < 8.5
    assert (
        large.macs
        < attnzoo.build("standard", heads=1, head_dim=64).cost(1, 2**17, is_causal=True).macs / 50
    )


def test_bad_options():
    for options, message in (
        ({"num_buckets": 5}, "num_buckets=5 must be even"),
        ({"num_hashes": 0}, "num_hashes=0"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ):
        with pytest.raises(ValueError, match=message):
            attnzoo.build("reformer", heads=1, head_dim=4, **options)
