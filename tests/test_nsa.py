"""Native sparse attention beyond the rules: gates, forced blocks, one choice for heads that share
keys; and sums of engines."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import Situation, close, tensors
from torch import Tensor

import attnzoo
from attnzoo import MultiheadAttention
from attnzoo.oracles import nsa

OPTIONS: dict[str, Any] = {"block_size": 4, "top_k": 4, "window_size": 6}
NAMES = ("compressed_gate", "selected_gate", "window_gate")


def build(**options: Any) -> attnzoo.Attention:
    return attnzoo.build("nsa", heads=4, head_dim=8, **{**OPTIONS, **options})


def gates(length: int, batch: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.rand(batch, 4, length).double() for name in NAMES}


def one_branch(name: str, length: int) -> dict[str, Tensor]:
    nothing = torch.zeros(2, 4, length).double()
    return {gate: nothing + (gate == name) for gate in NAMES}


@pytest.mark.parametrize(
    "situation", [Situation(40, 40), Situation(9, 40, "left"), Situation(40, 40, "interior")]
)
@pytest.mark.parametrize("backend", ["branches", "reference"])
def test_gates_weigh_the_branches(situation: Situation, backend: str) -> None:
    """Rows, A and gradients, the gates' too, against the loop."""
    q, k, v, upstream = tensors(situation)
    leaves = {"q": q, "k": k, "v": v, **gates(situation.query_length)}
    given = {name: x.requires_grad_() for name, x in leaves.items()}
    masks: Any = {"key_mask": situation.key_mask(), "is_causal": True}
    wanted, matrix = nsa(**given, **OPTIONS, **masks)
    attn = build(backend=backend)
    out = attn(**given, **masks)
    assert attn.last_backend == backend
    close(out, wanted, 1e-12, "rows")
    found, expected = (torch.autograd.grad(x, [*given.values()], upstream) for x in (out, wanted))
    for name, one, other in zip(given, found, expected, strict=True):
        close(one, other, 1e-12, name)
    given.pop("v")
    close(attn.weights(**given, **masks), matrix, 1e-12, "A")


def test_the_first_the_previous_and_the_own_block_are_seen() -> None:
    q, k, _, _ = tensors(Situation(40, 40, kv_heads=2))
    own = torch.arange(40) // 4
    for top_k, forced in ((1, (0,)), (2, (0, 1)), (3, (0, 1, None))):
        how = {"is_causal": True, **one_branch("selected_gate", 40)}
        seen = build(top_k=top_k).weights(q, k, **how) != 0
        wanted = torch.zeros(40, 40, dtype=torch.bool)
        for back in forced:
            block = torch.zeros_like(own) if back is None else own - back
            wanted |= block[:, None] == own
        assert torch.equal(seen, wanted.tril().expand_as(seen))
    seen = build(top_k=5).weights(q, k, **how) != 0
    assert bool((seen[..., 39, :].sum(-1) == 5 * 4).all())


def test_heads_that_share_keys_share_a_choice() -> None:
    q, k, _, _ = tensors(Situation(64, 64, kv_heads=2))
    how = {"is_causal": True, **one_branch("selected_gate", 64)}
    seen = build().weights(q, k, **how) != 0
    assert torch.equal(seen[:, 0], seen[:, 1]) and torch.equal(seen[:, 2], seen[:, 3])
    assert not torch.equal(seen[:, 0], seen[:, 2])


def test_a_block_is_compressed_once_it_has_ended() -> None:
    q, k, v, _ = tensors(Situation(12, 12))
    how = {"is_causal": True, **one_branch("compressed_gate", 12)}
    weights = build().weights(q, k, **how)
    assert not weights[:, :, :3].any() and bool((weights[:, :, 3, :4] == 0.25).all())
    ends = weights.unflatten(3, (3, 4))
    assert torch.equal(ends, ends[..., :1].expand_as(ends))
    assert bool((weights[:, :, 10, 8:] == 0).all() and (weights[:, :, 11, 8:] > 0).all())
    means = v.unflatten(2, (3, 4)).mean(3).repeat_interleave(2, 1)
    close(build()(q, k, v, **how)[:, :, 3], means[:, :, 0], 1e-12, "row")


def test_steps_take_their_own_gates() -> None:
    q, k, v, _ = tensors(Situation(40, 40))
    given, attn = gates(40), build()
    wanted = attn(q, k, v, is_causal=True, **given)
    state, rows = attn.init_state(2, kv_heads=2, dtype=torch.float64), []
    for start, end in ((0, 13), (13, 14), (14, 40)):
        some = slice(start, end)
        own = {name: x[:, :, some] for name, x in given.items()}
        now = [x[:, :, some] for x in (q, k, v)]
        out, state = attn.step(now[0], now[1], now[2], state, **own)
        rows.append(out)
    close(torch.cat(rows, 2), wanted, 1e-12, "rows")
    ids = torch.arange(40).expand(2, -1) // 25
    packed = attn(q, k, v, is_causal=True, segments=ids, **given)
    whole, _ = nsa(q, k, v, is_causal=True, segments=ids, **OPTIONS, **given)
    close(packed, whole, 1e-12, "packed rows")


def test_a_layer_makes_the_gates() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"attention": "nsa", "attention_options": OPTIONS}
    layer = MultiheadAttention(32, 4, batch_first=True, **options).double()
    made: Any = layer.attention.input_projections
    assert sorted(made) == sorted(NAMES)
    x = torch.randn(2, 20, 32).double()
    how: dict[str, Any] = {"is_causal": True, "need_weights": False}
    given = {name: made[name](x).transpose(1, 2) for name in NAMES}
    out, _ = layer(x, x, x, **how)
    torch.testing.assert_close(layer(x, x, x, **how, **given)[0], out, rtol=1e-12, atol=1e-12)
    out.sum().backward()
    assert all(made[name].out.weight.grad.abs().sum() > 0 for name in NAMES)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"block_size": 0}, "block_size=0 must be a whole number of at least 1"),
        ({"compressed_size": 6}, "block_size=4 must be a multiple of compressed_stride=6"),
        ({"compressed_stride": 3}, "compressed_stride=3 must divide compressed_size=4"),
        ({"top_k": 0}, "top_k=0 must be a whole number of at least 1"),
        ({"window_size": 0}, "window_size=0 must be a whole number of at least 1"),
        ({"scale": "a"}, "scale='a' must be a finite number"),
    ],
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build(**options)


LEARNED: dict[str, Any] = {
    **OPTIONS,
    "compressed_size": 6,
    "compressed_stride": 2,
    "key_compression": "mlp",
}


def with_places(**options: Any) -> attnzoo.Attention:
    """Whose places in a block are told apart, which they are not at the start."""
    attn = build(**{**LEARNED, **options}).double()
    with torch.no_grad():
        dict(attn.named_parameters())["engine.compressed.learned.places"].normal_()
    return attn


@pytest.mark.parametrize(
    "situation",
    [Situation(40, 40, kv_heads=2), Situation(9, 40, "left"), Situation(40, 40, "interior")],
)
@pytest.mark.parametrize("backend", ["branches", "reference"])
def test_learned_keys_and_their_gradients(situation: Situation, backend: str) -> None:
    """Rows, and gradients of q, k, v and of what is learned, places in a block among them."""
    attn = with_places(backend=backend)
    q, k, v, upstream = tensors(situation)
    learned = attn.oracle_arguments(1, 1, True)
    leaves = {"q": q, "k": k, "v": v}
    given = {name: x.requires_grad_() for name, x in leaves.items()}
    masks: Any = {"key_mask": situation.key_mask(), "is_causal": True}
    options = {name: x for name, x in LEARNED.items() if name != "key_compression"}
    wanted, _ = nsa(**given, **options, **masks, **learned)
    out = attn(**given, **masks)
    close(out, wanted, 1e-12, "rows")
    asked = [*given.values(), *learned.values()]
    found, expected = (torch.autograd.grad(x, asked, upstream) for x in (out, wanted))
    for name, one, other in zip([*given, *learned], found, expected, strict=True):
        close(one, other, 1e-11, name)
        assert other.abs().max() > 0, name


def test_learned_keys_decode_pack_and_are_copied() -> None:
    attn = with_places()
    q, k, v, _ = tensors(Situation(40, 40))
    whole = attn(q, k, v, is_causal=True)
    state = attn.init_state(2, kv_heads=2, dtype=torch.float64)
    first, state = attn.step(q[:, :, :30], k[:, :, :30], v[:, :, :30], state)
    rest, _ = attn.step(q[:, :, 30:], k[:, :, 30:], v[:, :, 30:], state)
    close(torch.cat([first, rest], 2), whole, 1e-12, "steps")
    ids = (torch.arange(40) >= 15).long().expand(2, -1)
    packed = attn(q, k, v, is_causal=True, segments=ids)
    apart = attn(q[:, :, 15:], k[:, :, 15:], v[:, :, 15:], is_causal=True)
    close(packed[:, :, 15:], apart, 1e-12, "a packed piece")
    twin = copy.deepcopy(attn)
    for weight in attn.parameters():  # the copy's choice reads the copy's own keys
        torch.nn.init.zeros_(weight)
    close(twin(q, k, v, is_causal=True), whole, 1e-12, "a copy")


@pytest.mark.parametrize("importance", ["probabilities", "logits"])
def test_the_cost_of_learned_keys_is_what_is_counted(importance: str) -> None:
    pytest.importorskip("fvcore")
    attn = build(**LEARNED, importance=importance)
    cost = attn.cost(2, 40, kv_heads=2, is_causal=True)
    q, k, v, _ = (x.float() for x in tensors(Situation(40, 40, kv_heads=2)))
    assert cost.parameters == sum(x.numel() for x in attn.parameters())
    found = attnzoo.count_flops(attn, q, k, v, is_causal=True)
    assert (found.macs, found.elementwise) == (cost.macs, cost.elementwise)
    plain = build(**{**LEARNED, "key_compression": "mean"}, importance=importance)
    # Blocks are 18 of a head: once for the rows, once for the choice.
    assert cost.macs - plain.cost(2, 40, kv_heads=2, is_causal=True).macs == (
        2 * 2 * 2 * 18 * (16 * 6 * 8 + 8 * 16)
    )


def test_what_heads_that_share_a_choice_find_important() -> None:
    """Two heads: one is sure of block 1, one slightly prefers block 2 by a logit that is larger."""
    q, k = (torch.zeros(1, heads, 32, 8) for heads in (2, 1))
    k[0, 0, 4:8, 0], k[0, 0, 8:12, 1] = 10.0, 10.0
    k[0, 0, 12:16, 2:4] = 10.0
    q[0, 0, -1, 0], q[0, 1, -1, :4] = 6.0, torch.tensor([-9.0, 5.0, 2.0, 2.9])
    seen = {}
    for importance in ("probabilities", "logits"):
        attn = attnzoo.build(
            "nsa",
            heads=2,
            head_dim=8,
            block_size=4,
            top_k=3,
            window_size=1,
            importance=importance,
            first_block=False,
        )
        gates = {name: torch.ones(1, 2, 32) * (name == "selected_gate") for name in NAMES}
        row = attn.weights(q, k, is_causal=True, **gates)[0, 0, -1]
        seen[importance] = sorted({int(j) // 4 for j in row.nonzero()[:, 0]})
    assert seen == {"probabilities": [1, 6, 7], "logits": [2, 6, 7]}


def test_the_first_block_need_not_be_forced() -> None:
    q, k, _, _ = tensors(Situation(40, 40, kv_heads=2))
    nothing = one_branch("selected_gate", 40)
    seen = [
        build(top_k=3, first_block=forced).double().weights(q, k, is_causal=True, **nothing) > 0
        for forced in (True, False)
    ]
    assert seen[0][:, :, 20:, 0].all() and not seen[1][:, :, 20:, 0].all()


@pytest.mark.parametrize(
    "wrong", [{"importance": "scores"}, {"key_compression": "MLP"}, {"first_block": 1}]
)
def test_options_that_are_none_are_refused(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        build(**wrong)
