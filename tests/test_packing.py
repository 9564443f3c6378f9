"""Packing is separation (rule 13): a packed row equals its pieces run apart, and the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from cases import Case, Situation, ask_oracle, cases, close, gradients_of, tensors, usual_cases
from small import build_small, of_each_folder
from stages import in_turn, only
from torch import Tensor

import attnzoo
from attnzoo import Attention, UnsupportedError

TOLERANCE = 1e-12
#: Lengths of the pieces of two samples: alike and of one length; short, in other numbers; and long
#: ones beside short ones.
ROWS = {
    "alike": ((16,) * 4, (16,) * 4),
    "short": ((20, 1, 3, 30), (7, 40, 7)),
    "long": ((70, 9, 2, 73), (64, 90)),
}


def ids_of(*rows: tuple[int, ...]) -> Tensor:
    """(batch, length): every piece has an id of its own, which says nothing of its place."""
    return torch.stack(
        [torch.repeat_interleave(7 - 3 * torch.arange(len(row)), torch.tensor(row)) for row in rows]
    )


def slots_of(segments: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Every piece as its sample and the slots of its tokens."""
    for sample, ids in enumerate(segments):
        for one in ids.unique():
            yield sample, (ids == one).nonzero()[:, 0]


def apart(attn: Attention, segments: Tensor, q: Tensor, k: Tensor, v: Tensor, **kind: bool):
    """The rows of every piece run by itself, put where its tokens stand."""
    out = torch.zeros_like(q)
    offset = k.shape[2] - q.shape[2]
    for sample, slots in slots_of(segments):
        rows = slots[slots >= offset] - offset
        if len(rows):
            one = slice(sample, sample + 1)
            found = attn(q[one][:, :, rows], k[one][:, :, slots], v[one][:, :, slots], **kind)
            out[sample, :, rows] = found[0]
    return out


def inputs_of(case: Case, length: int, queries: int | None = None) -> tuple[Tensor, ...]:
    q, k, v, upstream = tensors(Situation(queries or length, length), shift=case.shift)
    return q, (q if case.options.get("share_qk") else k), v, upstream


@pytest.mark.parametrize(("case", "rows"), in_turn(cases(), [*ROWS]))
def test_packed_equals_its_pieces(case: Case, rows: str) -> None:
    """Rows, A and gradients, of parameters too."""
    attn, segments = case.build(dtype=torch.float64), ids_of(*ROWS[rows])
    for is_causal in case.spec.forms:
        q, k, v, upstream = inputs_of(case, segments.shape[1])
        leaves = [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), *attn.parameters()]
        wanted = apart(attn, segments, q, k, v, is_causal=is_causal)
        out = attn(q, k, v, segments=segments, is_causal=is_causal)
        close(out, wanted, TOLERANCE, f"rows, {is_causal=}")
        found = gradients_of(out, upstream, *leaves)
        for one, other in zip(found, gradients_of(wanted, upstream, *leaves), strict=True):
            close(one, other, TOLERANCE, f"gradient, {is_causal=}")
        weights = attn.weights(q, k, segments=segments, is_causal=is_causal)
        assert bool((weights * (segments[:, None, :, None] != segments[:, None, None])).eq(0).all())
        close(weights @ v.repeat_interleave(2, 1), wanted, 1e-10, f"A times v, {is_causal=}")


@pytest.mark.parametrize("case", usual_cases(), ids=str)
@pytest.mark.parametrize("queries", [33, 12])
def test_packed_equals_the_oracle(case: Case, queries: int) -> None:
    """With padding in a piece, at the beginning of another, and a piece that stops and goes on;
    where queries are fewer than keys, the first pieces have no row."""
    if queries < 33 and not case.spec.cross:
        pytest.skip(f"{case.variant} needs as many queries as keys")
    attn, segments = case.build(dtype=torch.float64), ids_of((12, 3, 18), (20, 8, 5))
    segments[1, 23:25] = 1
    key_mask = torch.ones(2, 33, dtype=torch.bool)
    key_mask[0, 15:18], key_mask[1, 4], key_mask[1, 30:] = False, False, False
    for is_causal in case.spec.forms:
        q, k, v, _ = inputs_of(case, 33, queries)
        masks = {"key_mask": key_mask, "segments": segments, "is_causal": is_causal}
        out = attn(q, k, v, **masks)
        wanted, a = ask_oracle(attn, q, k, v, options=case.options, **masks)
        close(out, wanted, 1e-10, f"rows, {is_causal=}")
        close(attn.weights(q, k, **masks), a, 1e-10, f"A, {is_causal=}")


@pytest.mark.parametrize(
    "case", only(usual_cases(), [case for case in cases() if case.spec.decodes])
)
def test_steps_of_packed_rows(case: Case) -> None:
    """In pieces that cut segments anywhere; the last ones without ids, which go on with the last
    piece; and branching from a state that two samples share no longer."""
    attn, segments = case.build(dtype=torch.float64), ids_of((5, 1, 20, 14), (26, 14))
    q, k, v, _ = inputs_of(case, 40)
    wanted = apart(attn, segments, q, k, v, is_causal=True)
    state, rows = attn.init_state(2, 40, kv_heads=k.shape[1], dtype=q.dtype), []
    for first, end in pairwise([0, 3, 4, 30, 31, 38]):
        here = slice(first, end)
        out, state = attn.step(
            q[:, :, here], k[:, :, here], v[:, :, here], state, segments=segments[:, here]
        )
        rows.append(out)
    assert state.seen == 38 and state.batch_size == 2
    rows.append(attn.step(q[:, :, 38:], k[:, :, 38:], v[:, :, 38:], state)[0])
    close(torch.cat(rows, 2), wanted, 1e-11, "rows")
    swapped = state.select(torch.tensor([1, 0, 1]))
    q, k, v = (x[[1, 0, 1]] for x in (q, k, v))
    k = q if case.options.get("share_qk") else k
    out, after = attn.step(q[:, :, 38:], k[:, :, 38:], v[:, :, 38:], swapped)
    close(out, wanted[[1, 0, 1], :, 38:], 1e-11, "rows of a selection")
    again, _ = attn.step(q[:, :, 39:], k[:, :, 39:], v[:, :, 39:], after.crop(1))
    close(again, wanted[[1, 0, 1], :, 39:], 1e-11, "rows after going back")


@pytest.mark.parametrize("name", attnzoo.names())
def test_what_stands_in_a_piece_reaches_no_other(name: str) -> None:
    """NaN, in rows and in gradients, bit for bit."""
    attn = build_small(name, 4, 8)
    segments = ids_of((10, 6, 24))
    q, k, v = (torch.randn(1, 4, 40, 8) for _ in range(3))
    k = q if getattr(attn.engine, "share_qk", False) else k
    others = (segments != segments[:, 12:13])[:, None, :, None]
    for is_causal in attn.spec.forms:
        found = []
        for spoiled in (False, True):
            x = [y.masked_fill(~others & spoiled, float("nan")).requires_grad_() for y in (q, k, v)]
            out = attn(*x, segments=segments, is_causal=is_causal)
            kept = out.masked_fill(~others, 0.0)
            gradients = torch.autograd.grad(kept.nansum(), x)
            found.append([kept, *(one.masked_fill(~others, 0.0) for one in gradients)])
        for clean, one in zip(*found, strict=True):
            assert torch.equal(clean, one)


IN_GRAPHS = [case for case in usual_cases() if case.variant in of_each_folder()[:1]]


@pytest.mark.parametrize("case", only(IN_GRAPHS, cases()))
def test_where_no_id_can_be_read_rows_are_right_or_refused(case: Case) -> None:
    """In a graph that cannot be broken; forms beside the usual ones in one direction, in turn."""
    attn, segments = case.build(dtype=torch.float64), ids_of((70, 1, 9, 73), (130, 23))
    torch._dynamo.reset()
    compiled = torch.compile(attn, backend="eager", fullgraph=True)
    first = len(str(case)) % len(case.spec.forms)
    for is_causal in case.spec.forms if case in usual_cases() else case.spec.forms[first:][:1]:
        q, k, v, _ = inputs_of(case, 153)
        wanted = apart(attn, segments, q, k, v, is_causal=is_causal)
        try:
            out = compiled(q, k, v, segments=segments, is_causal=is_causal)
        except Exception as error:
            assert "packed row" in str(error), error  # noqa: PT017
            assert case.variant not in ("standard", "linear", "retention", "performer", "cosformer")
            continue
        close(out, wanted, TOLERANCE, f"rows, {is_causal=}")


@pytest.mark.parametrize(
    ("name", "queries"), in_turn(attnzoo.names(), [40, 33, 44], whole=of_each_folder())
)
def test_transforms_of_packed_rows_are_right_or_refused(name: str, queries: int) -> None:
    """Rows and A under vmap, with padding."""
    attn, segments = build_small(name, 4, 8).double(), ids_of((10, 6, 24), (20, 20))
    if queries != 40 and not attn.spec.cross:
        pytest.skip(f"{name} needs as many queries as keys")
    q, k, v, _ = tensors(Situation(queries, 40, kv_heads=4))
    k = q if getattr(attn.engine, "share_qk", False) else k
    key_mask = torch.ones(2, 40, dtype=torch.bool)
    key_mask[1, 17:23] = False
    for is_causal in attn.spec.forms:
        if queries > 40 and not is_causal:
            continue
        how = {"key_mask": key_mask, "segments": segments}
        for ask in (attn, lambda q, k, _, **how: attn.weights(q, k, **how)):
            expected = ask(q, k, v, **how, is_causal=is_causal)

            def one(q, k, v, m, s, ask=ask, is_causal=is_causal):
                rest = {"key_mask": m[None], "segments": s[None], "is_causal": is_causal}
                return ask(q[None], k[None], v[None], **rest)[0]

            try:
                found = torch.func.vmap(one)(q, k, v, key_mask, segments)
            except UnsupportedError as error:
                assert "packed row" in str(error)  # noqa: PT017
                continue
            close(found, expected, TOLERANCE, f"{is_causal=}")


@pytest.mark.parametrize("name", only(["linear"], ["linear", "sliding_window", "standard"]))
def test_a_piece_that_goes_on_is_refused_in_a_graph(name: str) -> None:
    """Where transforms cannot raise, rows and A are NaN."""
    attn = build_small(name, 4, 8)
    q, ids = torch.randn(1, 4, 12, 8), torch.tensor([[0] * 4 + [1] * 4 + [0] * 4])
    torch._dynamo.reset()
    compiled = torch.compile(attn, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="a piece that stops and goes on"):
        compiled(q, q, q, segments=ids, is_causal=True)

    def rows(q: Tensor, ids: Tensor) -> Tensor:
        return attn(q[None], q[None], q[None], segments=ids[None], is_causal=True)

    assert bool(torch.func.vmap(rows)(q, ids).isnan().all())


@pytest.mark.parametrize("name", ["standard", "flash", "linear", "retention", "sliding_window"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_slot_reaches_its_piece_alone_in_a_transform(name: str, bad: float) -> None:
    attn, segments = build_small(name, 4, 8), ids_of((5, 4, 3))
    q, k, v = (torch.randn(1, 4, 12, 8) for _ in range(3))
    v[:, :, 6] = bad
    for is_causal in attn.spec.forms:

        def rows(q, k, v, ids, is_causal=is_causal):
            return attn(q[None], k[None], v[None], segments=ids[None], is_causal=is_causal)[0]

        found = torch.func.vmap(rows)(q, k, v, segments).isnan().any(-1).any(1)[0]
        first = 6 if is_causal else 5
        assert not bool(found[:5].any()) and not bool(found[9:].any())
        assert name == "sliding_window" or bool(found[first:9].all())


@pytest.mark.parametrize("shape", [(12, 12), (1, 12), (12, 1), (4, 12, 12), (2, 1, 12, 1)])
def test_masks_of_fewer_axes(shape: tuple[int, ...]) -> None:
    """Beside ids that stop and go on too."""
    attn = build_small("standard", 4, 8).double()
    q, k, v, _ = tensors(Situation(12, 12))
    mask = torch.randn(shape).double()
    segments = torch.stack([torch.arange(12) % 2, torch.arange(12) // 5])
    same = segments[:, None, :, None] == segments[:, None, None]
    whole = mask.expand(2, 4, 12, 12).masked_fill(~same, -torch.inf)
    out = attn(q, k, v, attn_mask=mask, segments=segments)
    close(out, attn(q, k, v, attn_mask=whole), TOLERANCE, "rows")
    close(
        attn.weights(q, k, attn_mask=mask, segments=segments),
        attn.weights(q, k, attn_mask=whole),
        TOLERANCE,
        "A",
    )
    wanted, _ = ask_oracle(attn, q, k, v, attn_mask=mask, segments=segments)
    close(out, wanted, 1e-10, "the oracle's rows")


def test_arbitrary_masks_are_cut_too() -> None:
    attn, segments = build_small("standard", 4, 8).double(), ids_of((5, 5, 2), (4, 4, 4))
    q, k, v, _ = tensors(Situation(12, 12))
    for mask in (torch.rand(2, 1, 12, 12) > 0.3, torch.randn(12, 12).double()):
        out = attn(q, k, v, attn_mask=mask, segments=segments)
        same = (segments[:, None, :, None] == segments[:, None, None]).expand(2, 4, 12, 12)
        both = mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, -torch.inf)
        close(out, attn(q, k, v, attn_mask=both), TOLERANCE, "rows")


def test_the_backends_that_ran_are_told() -> None:
    attn = attnzoo.build("sliding_window", heads=4, head_dim=8, window=8)
    q = torch.randn(1, 4, 300, 8)
    attn(q, q, q, segments=ids_of((296, 4)), is_causal=True)
    assert attn.last_backend == "dense and tiles"
    attn.step(q, q, q, attn.init_state(1), segments=ids_of((8, 288, 4)))
    assert attn.last_backend == "dense and tiles"


@pytest.mark.parametrize("name", ["standard", "linear"])
def test_a_packed_row_of_nothing(name: str) -> None:
    attn = build_small(name, 4, 8)
    for batch, length in ((0, 5), (2, 0)):
        x = torch.randn(batch, 4, length, 8, requires_grad=True)
        ids = torch.zeros(batch, length, dtype=torch.long)
        out = attn(x, x, x, segments=ids)
        out.sum().backward()
        assert out.shape == x.shape
        assert attn.weights(x, x, segments=ids).shape == (batch, 4, length, length)


def test_more_queries_than_keys() -> None:
    """Causal, the first ones stand before every key."""
    attn, segments = build_small("linear", 4, 8).double(), ids_of((2, 4), (3, 3))
    q, k, v, _ = tensors(Situation(9, 6))
    out = attn(q, k, v, segments=segments, is_causal=True)
    assert bool(out[:, :, :3].eq(0).all())
    square = attn(q[:, :, 3:], k, v, segments=segments, is_causal=True)
    close(out[:, :, 3:], square, TOLERANCE, "rows")
    with pytest.raises(ValueError, match="first 3 of 9 queries stand before all of them"):
        attn(q, k, v, segments=segments)


BAD = [
    (torch.zeros(2, 12), "segments has dtype torch.float32.*use segments.long()"),
    (torch.zeros(2, 12, dtype=torch.bool), "segments has dtype torch.bool"),
    (torch.zeros(2, 11, dtype=torch.long), r"segments has shape \(2, 11\).*\(2, 12\)"),
    (torch.zeros(12, dtype=torch.long), r"segments has shape \(12,\)"),
    ([0] * 12, "segments is a list"),
]


@pytest.mark.parametrize(("segments", "message"), BAD)
def test_bad_segments(segments: Tensor, message: str) -> None:
    attn = build_small("standard", 4, 8)
    x = torch.randn(2, 4, 12, 8)
    for ask in (
        lambda: attn(x, x, x, segments=segments),
        lambda: attn.weights(x, x, segments=segments),
        lambda: attn.step(x, x, x, attn.init_state(2), segments=segments),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


def test_steps_that_cannot_be() -> None:
    attn = build_small("standard", 4, 8)
    x, ids = torch.randn(1, 4, 6, 8), ids_of((2, 4))
    state = attn.step(x, x, x, attn.init_state(1))[1]
    with pytest.raises(ValueError, match="taken 6 tokens without segments"):
        attn.step(x, x, x, state, segments=ids)
    packed = attn.step(x, x, x, attn.init_state(1, 11), segments=ids)[1]
    with pytest.raises(ValueError, match="goes on with piece 7 in sample 0"):
        attn.step(x[:, :, :1], x[:, :, :1], x[:, :, :1], packed, segments=ids[:, :1])
    with pytest.raises(ValueError, match="max_length=11"):
        attn.step(x, x, x, packed)
    for n in (4, 5):  # the piece whole, and more
        with pytest.raises(ValueError, match=f"n={n} must be at most 3: the last piece"):
            packed.crop(n)
    assert packed.crop(3).seen == 3


def test_steps_with_segments_in_a_graph_are_refused() -> None:
    attn = build_small("linear", 4, 8)
    x, ids = torch.randn(1, 4, 6, 8), ids_of((2, 4))

    def step(x: Tensor, ids: Tensor) -> Tensor:
        return attn.step(x, x, x, attn.init_state(1), segments=ids)[0]

    with pytest.raises(UnsupportedError, match="a step with segments reads their values"):
        torch.func.vmap(step)(x[None], ids[None])


def test_samples_whose_pieces_begin_apart_keep_their_places() -> None:
    """Three samples in another order than their groups; and a piece that a step has ended."""
    attn, segments = build_small("standard", 4, 8).double(), ids_of((6, 2), (3, 5), (6, 2))
    segments = segments[[0, 1, 0, 1, 0]]
    q, k, v, _ = tensors(Situation(8, 8, batch=5, kv_heads=4))
    wanted = apart(attn, segments, q, k, v, is_causal=True)
    state, rows = attn.init_state(5, dtype=q.dtype), []
    for here in (slice(0, 4), slice(4, 8)):
        now = (x[:, :, here] for x in (q, k, v))
        q_now, k_now, v_now = now
        out, state = attn.step(q_now, k_now, v_now, state, segments=segments[:, here])
        rows.append(out)
    close(torch.cat(rows, 2), wanted, TOLERANCE, "rows")
    one, state = q[:1, :, :1], attn.init_state(1, dtype=q.dtype)
    for piece in (5, 6):
        _, state = attn.step(one, one, one, state, segments=torch.tensor([[piece]]))
    with pytest.raises(ValueError, match="goes on with piece 5 in sample 0"):
        attn.step(one, one, one, state, segments=torch.tensor([[5]]))


@pytest.mark.parametrize("name", attnzoo.names())
def test_pieces_of_one_length_run_as_views(name: str) -> None:
    """Each head then holds them one behind the other; what differs by head stays with its head."""
    attn = build_small(name, 4, 8).double()
    q, k, v = (torch.randn(1, 4, 24, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    k = q if getattr(attn.engine, "share_qk", False) else k
    segments, upstream = ids_of((8, 8, 8)), torch.randn(1, 4, 24, 8, dtype=torch.float64)
    for is_causal in attn.spec.forms:
        out = attn(q, k, v, segments=segments, is_causal=is_causal)
        wanted = torch.cat(
            [
                attn(*(x[:, :, start : start + 8] for x in (q, k, v)), is_causal=is_causal)
                for start in (0, 8, 16)
            ],
            2,
        )
        close(out, wanted, TOLERANCE, f"rows, {is_causal=}")
        found = torch.autograd.grad(out, (q, v), upstream)
        for one, other in zip(found, torch.autograd.grad(wanted, (q, v), upstream), strict=True):
            close(one, other, TOLERANCE, f"gradients, {is_causal=}")
