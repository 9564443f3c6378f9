"""Attention whose keys the data select, beyond the rules: ties, who shares a choice, what is never
formed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Situation, close, gradients_of, preferring, tensors
from torch import Tensor

import attnzoo
from attnzoo.attention import Attention
from attnzoo.call import Call
from attnzoo.engines.native import library
from attnzoo.engines.sparse.selected.selection import NONE, Placed, highest
from attnzoo.oracles import indexed as oracle_of_index
from attnzoo.oracles import moba
from attnzoo.variants.selected import index_choice
from attnzoo.variants.selected.index_loss import index_loss

BACKENDS = ["tiles", "selected", "reference"]


def build(**options) -> Attention:
    return attnzoo.build("moba", heads=4, head_dim=8, **options).double()


def support(attn: Attention, q: Tensor, k: Tensor, **masks) -> Tensor:
    return attn.weights(q, k, **masks) != 0


def test_blocks_for_all_keys_are_exact_attention() -> None:
    q, k, v, _ = tensors(Situation(63, 63))
    exact, attn = attnzoo.build("standard", heads=4, head_dim=8), build(block_size=9, top_k=7)
    for is_causal in (False, True):
        close(attn(q, k, v, is_causal=is_causal), exact(q, k, v, is_causal=is_causal), 1e-12, "all")
        assert attn.last_backend == "dense"


def test_one_block_is_the_own_one() -> None:
    q, k, _, _ = tensors(Situation(23, 23))
    own = torch.arange(23) // 5
    seen = (own[:, None] == own).expand(2, 4, -1, -1)
    attn = build(block_size=5, top_k=1)
    assert torch.equal(support(attn, q, k), seen)
    assert torch.equal(support(attn, q, k, is_causal=True), seen.tril())


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_scores_the_earlier_block_is_seen(backend: str) -> None:
    """Keys that are all alike, and queries of zeros: every past block scores the same."""
    q, k, v, _ = tensors(Situation(40, 40, kv_heads=4))
    k = k[:, :, :1].expand_as(k).contiguous()
    q[:, 1] = 0
    attn = preferring(build(block_size=4, top_k=3), backend)
    out, weights = moba(q, k, v, block_size=4, top_k=3, is_causal=True)
    close(attn(q, k, v, is_causal=True), out, 1e-12, "output")
    own = torch.arange(40) // 4
    seen = (own < 2) | (own == own[:, None])
    assert torch.equal(weights != 0, seen.tril().expand_as(weights))


def test_highest_takes_the_first_of_equal_and_nothing_below() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0], [-torch.inf, 2.0, -torch.inf, -torch.inf]])
    assert highest(scores, 2).tolist() == [[1, 2], [1, NONE]]
    assert [sorted(row) for row in highest(scores, 6).tolist()] == [
        [NONE, NONE, 0, 1, 2, 3],
        [NONE] * 5 + [1],
    ]


def test_a_later_key_changes_no_choice() -> None:
    """A key that every query likes, appended in the block of the last rows, is in no mean that an
    earlier block's row has read; and its block's own rows see it only from itself on."""
    q, k, _, _ = tensors(Situation(40, 40, kv_heads=4))
    before = support(build(block_size=8, top_k=2), q, k, is_causal=True)
    k[:, :, 38] = 1e6
    after = support(build(block_size=8, top_k=2), q, k, is_causal=True)
    assert torch.equal(before[:, :, :38], after[:, :, :38])


def test_each_head_of_a_group_chooses_for_itself() -> None:
    q, k, _, _ = tensors(Situation(64, 64, kv_heads=1))
    seen = support(build(block_size=4, top_k=3), q, k, is_causal=True)
    assert all(not torch.equal(seen[:, 0], seen[:, head]) for head in (1, 2, 3))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"block_size": 0}, "block_size=0 must be a whole number of at least 1"),
        ({"top_k": 2.5}, "top_k=2.5 must be a whole number of at least 1"),
    ],
)
def test_bad_options(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build(**options)


def indexed(**options) -> Attention:
    return attnzoo.build("indexed", heads=4, head_dim=8, **options).double()


def index_inputs(
    situation: Situation, index_heads: int = 4, key_heads: int = 1, seed: int = 1
) -> dict[str, Tensor]:
    """Of an indexer of width 6, rounded to float32."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(situation.batch, *sizes, generator=generator).double()

    return {
        "q_index": draw(index_heads, situation.query_length, 6),
        "k_index": draw(key_heads, situation.key_length, 6),
        "w_index": draw(index_heads, situation.query_length),
    }


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 6},
        {"top_k": 6, "per_group": True},
        {"top_k": 12, "block_size": 4},
        {"top_k": 12, "block_size": 4, "per_group": True, "index_heads": 4, "index_dim": 6},
    ],
    ids=str,
)
def test_an_indexer_chooses(options: dict, is_causal: bool) -> None:
    """By every backend, with one key head of the index and with two, padded and cross."""
    for situation, key_heads in (
        (Situation(30, 30), 1),
        (Situation(30, 30, "left"), 2),
        (Situation(7, 30, "interior"), 1),
    ):
        q, k, v, upstream = tensors(situation)
        inputs = index_inputs(situation, key_heads=key_heads)
        masks: dict[str, Any] = {"key_mask": situation.key_mask(), "is_causal": is_causal}
        wanted = {name: value for name, value in options.items() if "index" not in name}
        own = [x.clone().requires_grad_() for x in (q, k, v)]
        out, weights = oracle_of_index(own[0], own[1], own[2], **wanted, **inputs, **masks)
        expected = gradients_of(out, upstream, *own)
        given: dict[str, Any] = {**masks, **inputs}
        close(indexed(**options).weights(q, k, **given), weights, 1e-10, "weights")
        for backend in indexed(**options).engine.backend_names():
            attn = preferring(indexed(**options), backend)
            own = [x.clone().requires_grad_() for x in (q, k, v)]
            found = attn(*own, **given)
            close(found, out, 1e-10, f"output by {backend}")
            for actual, gradient in zip(gradients_of(found, upstream, *own), expected, strict=True):
                close(actual, gradient, 1e-10, f"gradient by {backend}")


def test_of_equal_index_scores_the_earlier_key_is_seen() -> None:
    """ReLU leaves most scores of one index head 0."""
    situation = Situation(20, 20)
    q, k, _, _ = tensors(situation)
    inputs = {name: -x.abs() for name, x in index_inputs(situation, 1).items()}
    inputs["k_index"] = inputs["k_index"].abs()
    for options in ({"top_k": 4}, {"top_k": 4, "block_size": 2}):
        for backend in indexed(**options).engine.backend_names():
            attn = preferring(indexed(**options), backend)
            seen = attn(q, k, torch.eye(20).double().expand(2, 2, -1, -1), is_causal=True, **inputs)
            first = (torch.arange(20) < 4).expand(20, -1).tril()
            assert torch.equal(seen != 0, first.expand_as(seen)), backend


@pytest.mark.parametrize("block_size", [1, 2])
def test_an_indexers_keys_are_kept_while_decoding(block_size: int) -> None:
    situation = Situation(25, 25)
    q, k, v, _ = tensors(situation)
    inputs = index_inputs(situation)
    attn = indexed(top_k=6, block_size=block_size, index_heads=4, index_dim=6)
    whole = attn(q, k, v, is_causal=True, **inputs)
    state, rows = attn.init_state(2, kv_heads=2, dtype=torch.float64), []
    for start, end in ((0, 9), (9, 10), (10, 11), (11, 25)):
        some = {name: x[:, :, start:end] for name, x in inputs.items()}
        own = [x[:, :, start:end] for x in (q, k, v)]
        out, state = attn.step(own[0], own[1], own[2], state, **some)
        rows.append(out)
    close(torch.cat(rows, 2), whole, 1e-12, "steps")
    held = sum(x.nbytes for x in (state.k, state.v, *state.inputs.values()))
    cost = attn.cost(2, 25, kv_heads=2, is_causal=True, dtype=torch.float64)
    assert cost.state_bytes == held
    with pytest.raises(ValueError, match="came with q_index, k_index and w_index and these come"):
        indexed(top_k=6).step(q, k, v, state)


def test_bad_index_inputs() -> None:
    situation = Situation(9, 9)
    q, k, v, _ = tensors(situation)
    inputs = index_inputs(situation)
    with pytest.raises(ValueError, match="lacks w_index; an indexer's"):
        indexed()(q, k, v, q_index=inputs["q_index"], k_index=inputs["k_index"])
    with pytest.raises(ValueError, match="lacks q_index and k_index and w_index"):
        indexed(index_heads=4)(q, k, v)
    with pytest.raises(ValueError, match="built with index_heads=2 and index_dim=6"):
        indexed(index_heads=2, index_dim=6)(q, k, v, **inputs)
    with pytest.raises(ValueError, match="multiple of k_index's and of 2"):
        indexed(per_group=True)(q, k, v, **index_inputs(situation, 3))
    with pytest.raises(ValueError, match="top_k=10 is no multiple of block_size=4"):
        indexed(top_k=10, block_size=4)
    with pytest.raises(ValueError, match="index_dim=4 is of no indexer"):
        indexed(index_dim=4)
    bad = {**inputs, "q_index": inputs["q_index"].clone()}
    bad["q_index"][0, 1, 5, 2] = float("nan")
    out = indexed(top_k=3)(q, k, v, is_causal=True, **bad)
    assert out[0, :, 5].isnan().all() and out.isnan().sum() == 4 * 8


def loop_of_the_loss(q, k, inputs, mask, is_causal: bool, segments) -> Tensor:
    """The mean over real rows of the divergence, a row at a time."""
    queries, keys = q.shape[2], k.shape[2]
    divergences = []
    for b in range(2):
        for t in range(queries):
            token = keys - queries + t
            of_tokens = is_causal or segments is not None or queries == keys
            seen = [
                s
                for s in range(keys)
                if mask[b, s]
                and (s <= token or not is_causal)
                and (segments is None or segments[b, s] == segments[b, token])
            ]
            if not seen or (of_tokens and not mask[b, token]):
                continue
            scores = torch.stack(
                [
                    sum(  # pyright: ignore[reportArgumentType]
                        inputs["w_index"][b, h, t]
                        * (inputs["q_index"][b, h, t] @ inputs["k_index"][b, 0, s]).relu()
                        for h in range(4)
                    )
                    for s in seen
                ]
            )
            logits = (q[b, :, t] @ k.repeat_interleave(2, 1)[b, :, seen].mT)[
                torch.arange(4), torch.arange(4)
            ]
            p = (logits * 8**-0.5).softmax(-1).mean(0)
            divergences.append((p * (p.log() - scores.log_softmax(0))).sum())
    return torch.stack(divergences).mean()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("lengths", "packed"),
    [((12, 12), False), ((12, 12), True), ((5, 12), False), ((5, 12), True), ((15, 12), False)],
)
def test_the_loss_of_an_indexer(lengths: tuple[int, int], is_causal: bool, packed: bool) -> None:
    """Against a loop, with its gradients."""
    situation = Situation(*lengths, kv_heads=2)
    q, k, _, _ = tensors(situation)
    inputs: dict[str, Any] = {
        name: x.requires_grad_() for name, x in index_inputs(situation).items()
    }
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :4] = mask[1, 9:] = False
    segments = torch.tensor([[0] * 8 + [1] * 4, [2] * 3 + [5] * 9]) if packed else None
    expected = loop_of_the_loss(q, k, inputs, mask, is_causal, segments)
    given: Any = {"key_mask": mask, "is_causal": is_causal, "segments": segments}
    found = index_loss(q, k, **inputs, **given)
    close(found, expected, 1e-12, "loss")
    wanted = torch.autograd.grad(expected, list(inputs.values()))
    for one, other in zip(torch.autograd.grad(found, list(inputs.values())), wanted, strict=True):
        close(one, other, 1e-12, "gradient of the loss")
    if lengths == (12, 12):
        own = torch.eye(12, dtype=torch.bool).expand(2, -1, -1)
        assert index_loss(q, k, **inputs, **given, selected=own).item() == 0


def _of_tokens(inputs: dict[str, Any], some: slice) -> dict[str, Any]:
    return {name: x[:, :, some] for name, x in inputs.items()}


def test_a_packed_loss_is_that_of_its_pieces() -> None:
    situation = Situation(12, 12)
    q, k, _, _ = tensors(situation)
    inputs: dict[str, Any] = index_inputs(situation)
    ids = (torch.arange(12) >= 5).long().expand(2, -1)
    pieces = [
        index_loss(q[:, :, some], k[:, :, some], **_of_tokens(inputs, some))
        for some in (slice(0, 5), slice(5, 12))
    ]
    whole = index_loss(q, k, **inputs, segments=ids)
    close(whole, (5 * pieces[0] + 7 * pieces[1]) / 12, 1e-12, "packed loss")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"w_index": (2, 4, 11)}, r"w_index has shape \(2, 4, 11\).* must be \(2, 4, 12\)"),
        ({"k_index": (2, 1, 11, 4)}, r"k_index has shape \(2, 1, 11, 4\)"),
        ({"k_index": (2, 3, 12, 8)}, "k_index has 3 heads, which do not divide"),
        ({"segments": (2, 11)}, r"segments has shape \(2, 11\)"),
    ],
)
def test_sizes_of_a_loss_that_do_not_agree_are_one_sentence(wrong, said) -> None:
    situation = Situation(12, 12)
    q, k, _, _ = tensors(situation)
    width = index_inputs(situation)["q_index"].shape[3]
    ((name, shape),) = wrong.items()
    shape = (*shape[:3], width) if len(shape) == 4 else shape
    given: Any = {**index_inputs(situation), name: torch.zeros(shape).double()}
    with pytest.raises(ValueError, match=said.replace("11, 4", f"11, {width}")):
        index_loss(q, k, **given)


def test_the_oracle_cuts_an_indexers_inputs_as_it_cuts_pieces() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 12, 4).double() for _ in range(3))
    inputs = {"q_index": torch.randn(2, 2, 12, 4), "k_index": torch.randn(2, 1, 12, 4)}
    inputs["w_index"] = torch.rand(2, 2, 12)
    segments = torch.tensor([[0] * 5 + [1] * 7, [3] * 12])
    attn = attnzoo.build("indexed", 2, 4, top_k=3)
    given = {name: x.double() for name, x in inputs.items()}
    expected, _ = attnzoo.oracles.indexed(
        q, k, v, top_k=3, segments=segments, is_causal=True, **inputs
    )
    found = attn(q, k, v, segments=segments, is_causal=True, **given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["normal", "ties", "closer than float32 tells", "nan"])
@pytest.mark.parametrize("per_group", [False, True])
def test_scores_that_are_tried_in_float32_choose_what_float64_does(
    kind: str, per_group: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    situation = Situation(64, 64, kv_heads=2)
    q, k, _, _ = (x.float() for x in tensors(situation))
    inputs = {name: x.float() for name, x in index_inputs(situation, key_heads=2).items()}
    if kind == "ties":
        inputs = {name: x.round() for name, x in inputs.items()}
    if kind == "closer than float32 tells":  # keys part in their last digits alone
        inputs["k_index"] = 1 + inputs["k_index"] * 2.0**-21
        inputs["q_index"], inputs["w_index"] = (
            inputs[name].abs() + 1 for name in ("q_index", "w_index")
        )
    if kind == "nan":
        inputs["k_index"][0, 0, 9, 2] = float("nan")
    attn = attnzoo.build("indexed", 4, 8, block_size=8, top_k=24, per_group=per_group)
    call = Call(q, k, k, is_causal=True, inputs=inputs)
    chosen, tried = [], []
    error = index_choice.Indexer.error
    monkeypatch.setattr(
        index_choice.Indexer, "error", lambda *given: tried.append(1) or error(*given)
    )
    for least in (2**60, 1):
        monkeypatch.setattr(index_choice, "ROUNDED", least)
        found = attn.engine.selector.select(Placed.of(call)).blocks  # pyright: ignore
        chosen.append(found.sort(-1).values)
    assert tried == [1]
    assert torch.equal(*chosen)
    if library.cannot_compile() is None:
        found = attn.engine.selector.select_natively(Placed.of(call)).blocks  # pyright: ignore
        assert torch.equal(found.sort(-1).values, chosen[0])


def test_what_stands_in_padding_reaches_no_gradient_of_the_loss() -> None:
    situation = Situation(12, 12)
    q, k, _, _ = tensors(situation)
    mask = torch.arange(12).expand(2, -1) < torch.tensor([[12], [9]])
    found = []
    for spoiled in (False, True):
        inputs: dict[str, Any] = index_inputs(situation)
        with torch.no_grad():
            for name, x in inputs.items():
                at = ~mask[:, None] if name == "w_index" else ~mask[:, None, :, None]
                x.masked_fill_(at & spoiled, float("nan"))
        for x in inputs.values():
            x.requires_grad_()
        loss = index_loss(q, k, **inputs, key_mask=mask)
        found.append([loss, *torch.autograd.grad(loss, list(inputs.values()))])
    for clean, one in zip(*found, strict=True):
        assert torch.equal(clean, one)
