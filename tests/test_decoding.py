"""Decoding is one more row of A: however the tokens arrive, `step` gives the rows of one forward
with is_causal=True."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from cases import (
    Case,
    Situation,
    cases,
    close,
    gradients_of,
    padding,
    tensors,
    usual_cases,
    with_backends,
)
from stages import in_turn, staged
from torch import Tensor

import attnzoo
from attnzoo import Attention
from attnzoo.registry import sized

DECODERS = [case for case in cases() if case.spec.decodes]
USUAL = pytest.mark.parametrize(
    "case", [case for case in usual_cases() if case.spec.decodes], ids=str
)
TOLERANCE = 1e-10
N = 150  # more than one chunk of the causal scan


def chunks(lengths: list[int], *some: Tensor | None) -> list[list[Any]]:
    """The tensors cut along the length (dimension 2, or 1 of a key_mask)."""
    columns = [
        [None] * len(lengths) if x is None else x.split(lengths, 2 if x.dim() == 4 else 1)
        for x in some
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def decode(
    attn: Attention,
    lengths: list[int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    state=None,
) -> tuple[Tensor, Any]:
    """All rows, the tokens given in pieces of these lengths."""
    if state is None:
        state = attn.init_state(q.shape[0], kv_heads=k.shape[1], dtype=q.dtype)
    rows = []
    for piece_q, piece_k, piece_v, mask in chunks(lengths, q, k, v, key_mask):
        out, state = attn.step(piece_q, piece_k, piece_v, state, key_mask=mask)
        rows.append(out)
    return torch.cat(rows, 2), state


def random_lengths(total: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    lengths = []
    while total:
        lengths.append(min(total, generator.choice([1, 1, 2, 3, 5, 17, 40])))
        total -= lengths[-1]
    return lengths


@pytest.mark.parametrize(
    ("case", "kv_heads"),
    [
        staged(case, kv_heads, first=case in usual_cases() and kv_heads == (4, 1)[place % 2])
        for place, case in enumerate(DECODERS)
        for kv_heads in ((4, 1) if case in usual_cases() else (1,))
    ],
)
def test_token_by_token(case: Case, kv_heads: int) -> None:
    attn = case.build(dtype=torch.float64)
    q, k, v, _ = tensors(Situation(N, N, kv_heads=kv_heads), shift=case.shift)
    rows, state = decode(attn, [1] * N, q, k, v)
    close(rows, attn(q, k, v, is_causal=True), TOLERANCE, "rows one by one")
    assert state.elements() > 0


@pytest.mark.parametrize(
    ("case", "kind"), in_turn(DECODERS, ["none", "left", "right", "interior", "whole"])
)
def test_random_pieces_with_padding(case: Case, kind: str) -> None:
    """Any cut into pieces; padding, left padding of a prefill above all, is told once and
    remembered."""
    attn = case.build(dtype=torch.float64)
    q, k, v, _ = tensors(Situation(N, N), shift=case.shift)
    mask = padding(kind, 2, N)
    expected = attn(q, k, v, key_mask=mask, is_causal=True)
    for seed in range(3 if case in usual_cases() else 1):
        rows, _ = decode(attn, random_lengths(N, seed), q, k, v, mask)
        close(rows, expected, TOLERANCE, f"rows in pieces {seed}")


@pytest.mark.parametrize(
    ("case", "kind", "piece"),
    in_turn(DECODERS, [("left", 40), ("left", 13), ("right", 13), ("interior", 13)]),
)
def test_a_padded_prompt_in_chunks_then_tokens_without_a_mask(
    case: Case, kind: str, piece: int
) -> None:
    """A padded batch goes on: its prompt in pieces, of which some may be padding alone, then tokens
    that are all real."""
    attn = case.build(dtype=torch.float64)
    q, k, v, _ = tensors(Situation(60, 60), shift=case.shift)
    prompt = padding(kind, 2, 40)
    assert prompt is not None
    mask = torch.cat([prompt, torch.ones(2, 20, dtype=torch.bool)], 1)
    lengths = [min(piece, 40 - start) for start in range(0, 40, piece)]
    early = [x[:, :, :40] for x in (q, k, v)]
    first, state = decode(attn, lengths, early[0], early[1], early[2], prompt)
    rest, _ = decode(attn, [1] * 20, q[:, :, 40:], k[:, :, 40:], v[:, :, 40:], state=state)
    close(
        torch.cat([first, rest], 2),
        attn(q, k, v, key_mask=mask, is_causal=True),
        TOLERANCE,
        "rows of and behind a padded prompt",
    )


@pytest.mark.parametrize(
    ("case", "backend"),
    [pytest.param(c, b, id=f"{c}-{b}") for c, b in with_backends(usual_cases()) if c.spec.decodes],
)
def test_every_backend_decodes(case: Case, backend: str) -> None:
    attn = case.build(dtype=torch.float64, prefer=backend)
    q, k, v, _ = tensors(Situation(70, 70), shift=case.shift)
    rows, _ = decode(attn, [30, 1, 1, 38], q, k, v)
    close(rows, attn(q, k, v, is_causal=True), TOLERANCE, "rows in pieces")


@USUAL
def test_split_and_resume_on_a_copy_of_the_module(case: Case) -> None:
    """The state holds everything: another module with the same state_dict takes it over."""
    first, second = case.build(dtype=torch.float64), case.build(dtype=torch.float64)
    second.load_state_dict(first.state_dict())
    q, k, v, _ = tensors(Situation(N, N), shift=case.shift)
    half, state = decode(first, [N - 50], q[:, :, :-50], k[:, :, :-50], v[:, :, :-50])
    rest, _ = decode(second, [20, 30], q[:, :, -50:], k[:, :, -50:], v[:, :, -50:], state=state)
    close(
        torch.cat([half, rest], 2),
        first(q, k, v, is_causal=True),
        TOLERANCE,
        "rows of a resumed state",
    )


@USUAL
@pytest.mark.parametrize("room", [None, 64])
def test_two_continuations_of_one_state(case: Case, room: int | None) -> None:
    """A state is a value: going on from it twice, in turns, disturbs neither, and it can be gone on
    from again."""
    attn = case.build(dtype=torch.float64)
    q, k, v, _ = tensors(Situation(30, 30, kv_heads=4), shift=case.shift)
    tails = [
        [
            x[:, :, :24]
            for x in tensors(Situation(24, 24, kv_heads=4), seed=seed, shift=case.shift)[:3]
        ]
        for seed in (1, 2)
    ]
    wholes = [
        attn(*(torch.cat([a, b], 2) for a, b in zip((q, k, v), tail, strict=True)), is_causal=True)[
            :, :, 30:
        ]
        for tail in tails
    ]
    with torch.no_grad():
        _, root = attn.step(q, k, v, attn.init_state(2, room, dtype=q.dtype))
        states, rows = [root, root], ([], [])
        for i in range(24):
            for branch in (0, 1):
                q1, k1, v1 = (x[:, :, i : i + 1] for x in tails[branch])
                out, states[branch] = attn.step(q1, k1, v1, states[branch])
                rows[branch].append(out)
        for branch in (0, 1):
            close(torch.cat(rows[branch], 2), wholes[branch], TOLERANCE, f"branch {branch}")
        q1, k1, v1 = tails[1]
        again, _ = attn.step(q1, k1, v1, root)
        close(again, wholes[1], TOLERANCE, "the root, gone on from once more")


@USUAL
@pytest.mark.parametrize("trained", ["qkv", "q"])
def test_gradients_flow_through_steps(case: Case, trained: str) -> None:
    """Backpropagation through decoding equals that through one causal forward."""
    attn = case.build(dtype=torch.float64)
    q, k, v, upstream = tensors(Situation(20, 20), shift=case.shift)
    inputs = [
        x.requires_grad_() for name, x in zip("qkv", (q, k, v), strict=True) if name in trained
    ]
    rows, _ = decode(attn, [9, 1, 1, 9], q, k, v)
    stepped = gradients_of(rows, upstream, *inputs)
    for name, actual, expected in zip(
        trained,
        stepped,
        gradients_of(attn(q, k, v, is_causal=True), upstream, *inputs),
        strict=True,
    ):
        close(actual, expected, TOLERANCE, f"gradient of {name}")


@USUAL
def test_a_bad_token_does_not_reach_earlier_rows_of_its_piece(case: Case) -> None:
    attn = case.build(dtype=torch.float64)
    q, k, v, _ = tensors(Situation(30, 30), shift=case.shift)
    expected = attn(q, k, v, is_causal=True)
    for bad in (float("nan"), float("inf")):
        k_bad, v_bad = k.clone(), v.clone()
        k_bad[:, :, 25], v_bad[:, :, 25] = bad, bad
        rows, _ = decode(attn, [10, 20], q, k_bad, v_bad)
        close(rows[:, :, :25], expected[:, :, :25], TOLERANCE, f"rows before a key that is {bad}")


@USUAL
def test_past_max_length_is_an_error(case: Case) -> None:
    attn = case.build()
    q, k, v, _ = (x.float() for x in tensors(Situation(5, 5, kv_heads=4), shift=case.shift))
    _, state = attn.step(q, k, v, attn.init_state(2, 7))
    with pytest.raises(ValueError, match=r"taken 5 tokens.*5 more.*max_length=7"):
        attn.step(q, k, v, state)
    _, state = attn.step(q[:, :, :2], k[:, :, :2], v[:, :, :2], state)
    with pytest.raises(ValueError, match=r"7 tokens.*max_length=7"):
        attn.step(q[:, :, :1], k[:, :, :1], v[:, :, :1], state)


@pytest.mark.parametrize(
    ("case", "dtype"),
    in_turn([case for case in usual_cases() if case.spec.decodes], [torch.float16, torch.bfloat16]),
)
def test_half_precision_decoding_keeps_its_sums_in_float32(case: Case, dtype: torch.dtype) -> None:
    n = 300
    q, k, v, _ = (
        x.to(dtype)
        for x in tensors(Situation(n, n, heads=1, kv_heads=1, batch=1), shift=case.shift)
    )
    exact = case.build(1).double()(q.double(), k.double(), v.double(), is_causal=True)
    reference = case.build(1, dtype=dtype, backend="reference")(q, k, v, is_causal=True)
    rows, _ = decode(case.build(1, dtype=dtype), [1] * n, q, k, v)
    assert rows.dtype == dtype
    error, allowed = (rows.double() - exact).norm(), (reference.double() - exact).norm()
    assert error <= 2 * allowed, f"error {error:.3g}, the reference's is {allowed:.3g}"


@USUAL
def test_values_may_be_wider_than_keys(case: Case) -> None:
    attn = case.build(dtype=torch.float64)
    q, k, v, _ = tensors(Situation(12, 12), shift=case.shift)
    wide = torch.cat([v, 2 * v, v[..., :1]], -1)
    rows, _ = decode(attn, [5, 7], q, k, wide)
    close(rows, attn(q, k, wide, is_causal=True), TOLERANCE, "rows with wide values")


@torch.no_grad()
def sizes(attn: Attention, steps: int) -> list[int]:
    q, k, v, _ = tensors(Situation(1, 1, heads=attn.heads, kv_heads=attn.heads, batch=1))
    state, found = attn.init_state(1, dtype=q.dtype), []
    for _ in range(steps):
        _, state = attn.step(q, k, v, state)
        found.append(state.elements())
    return found


@pytest.mark.parametrize("window", [1, 8, 50])
def test_a_window_keeps_no_more_than_the_window(window: int) -> None:
    """Nor does the storage behind it grow, however long it runs."""
    attn = Case("sliding_window", {"window": window}).build(2, dtype=torch.float64)
    assert max(sizes(attn, 400)) <= window * 2 * 2 * 8
    q, k, v, _ = tensors(Situation(1, 1, heads=2, kv_heads=2, batch=1))
    state, storage = attn.init_state(1, dtype=q.dtype), []
    with torch.no_grad():
        for _ in range(400):
            _, state = attn.step(q, k, v, state)
            storage.append(state.buffer.k.shape[2])
    assert max(storage) <= 2 * window + 64


@pytest.mark.parametrize(
    "case", [case for case in DECODERS if case.spec.family == "kernel"], ids=str
)
def test_a_kernel_keeps_a_constant_state(case: Case) -> None:
    """Or, where its state is a tree, one that grows where the length doubles."""
    attn = case.build(2, dtype=torch.float64)
    grows = attn.cost(1, 31, is_causal=True).state_growth > 0
    assert len(set(sizes(attn, 50))) == (6 if grows else 1)


@USUAL
def test_the_cost_names_the_state_that_decoding_carries(case: Case) -> None:
    attn = case.build(2, dtype=torch.float64)
    for steps in (1, 40):
        assert sizes(attn, steps)[-1] == attn.cost(1, steps, is_causal=True).state_elements


@pytest.mark.parametrize("case", [case for case in usual_cases() if not case.spec.decodes], ids=str)
def test_what_does_not_decode_says_so(case: Case) -> None:
    attn = case.build()
    with pytest.raises(attnzoo.UnsupportedError, match=f"{case.variant} does not decode.*standard"):
        attn.init_state(1)
    q, k, v, _ = (x.float() for x in tensors(Situation(1, 1)))
    with pytest.raises(attnzoo.UnsupportedError, match=f"{case.variant} does not decode.*standard"):
        attn.step(q, k, v, None)


@USUAL
def test_rows_of_the_batch_are_selected(case: Case) -> None:
    """The state of some rows, in any order and more than once, goes on as theirs; the state that it
    came from stays what it was."""
    attn = case.build(dtype=torch.float64)
    q, k, v, _ = tensors(Situation(40, 40, kv_heads=4), shift=case.shift)
    mask, rows = padding("left", 2, 40), torch.tensor([1, 1, 0])
    assert mask is not None
    expected = attn(q, k, v, key_mask=mask, is_causal=True)[:, :, 30:]
    with torch.no_grad():
        _, root = attn.step(
            q[:, :, :30],
            k[:, :, :30],
            v[:, :, :30],
            attn.init_state(2, dtype=q.dtype),
            key_mask=mask[:, :30],
        )
        chosen = root.select(rows)
        assert (
            chosen.batch_size == 3
            and chosen.seen == 30
            and chosen.elements() * 2 == root.elements() * 3
        )
        one_by_one, _ = decode(
            attn,
            [1] * 10,
            q[rows, :, 30:],
            k[rows, :, 30:],
            v[rows, :, 30:],
            mask[rows, 30:],
            state=chosen,
        )
        close(one_by_one, expected[rows], TOLERANCE, "rows of the selected state")
        again, _ = decode(
            attn, [4, 6], q[:, :, 30:], k[:, :, 30:], v[:, :, 30:], mask[:, 30:], state=root
        )
        close(again, expected, TOLERANCE, "rows of the state it came from")


@USUAL
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_samples_that_a_state_does_not_have_are_refused(case: Case, packed: bool) -> None:
    attn = case.build(dtype=torch.float64)
    q, k, v, _ = tensors(Situation(4, 4, kv_heads=4), shift=case.shift)
    ids = torch.tensor([[0, 0, 1, 1]] * 2) if packed else None
    _, state = attn.step(q, k, v, attn.init_state(2, dtype=q.dtype), segments=ids)
    for rows, said in (
        (torch.tensor([2]), "rows holds 2, and the state has 2 samples, 0 to 1"),
        (torch.tensor([0, -1]), "rows holds -1, and"),
        ([0], r"rows is \[0\]; give the indices of samples as an integer tensor"),
        (torch.tensor([True, False]), r"rows is torch.bool \(2,\)"),
        (torch.tensor(1), r"rows is torch.int64 \(\)"),
    ):
        with pytest.raises(ValueError, match=said):
            state.select(rows)


@USUAL
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_tokens_that_do_not_go_with_those_before_are_refused(case: Case, packed: bool) -> None:
    """Values of another width, and tokens of more digits than a state has kept."""
    attn = case.build(dtype=torch.float32)
    q, k, v, _ = (x.float() for x in tensors(Situation(8, 8, kv_heads=4)))
    given: Any = {"segments": torch.tensor([[0] * 5 + [1] * 2] * 2)} if packed else {}
    first, second, third = (x[:, :, :7] for x in (q, k, v))
    _, state = attn.step(first, second, third, attn.init_state(2), **given)
    more: Any = {"segments": torch.ones(2, 1, dtype=torch.long)} if packed else {}
    q, k, v = (x[:, :, 7:] for x in (q, k, v))
    with pytest.raises(ValueError, match="v has value_dim=11 and the state holds values of 8"):
        attn.step(q, k, v.new_zeros(*v.shape[:3], 11), state, **more)
    attn.to(torch.float64)
    with pytest.raises(ValueError, match=r"float64 and the state has taken torch\.float32"):
        attn.step(q.double(), k.double(), v.double(), state, **more)
    attn.to(torch.float32)
    attn.step(q, k, v, state, **more)


@USUAL
def test_the_state_of_another_variant_is_refused(case: Case) -> None:
    attn, other = case.build(), attnzoo.build("linear", heads=4, head_dim=8).init_state(2)
    if isinstance(other, type(attn.init_state(2))):
        other = attnzoo.build("standard", heads=4, head_dim=8).init_state(2)
    q, k, v, _ = (x.float() for x in tensors(Situation(1, 1, kv_heads=4)))
    for state in (other, None):
        with pytest.raises(ValueError, match=f"state is a {type(state).__name__}; {case.variant}"):
            attn.step(q, k, v, state)
    sinks = attnzoo.build("sliding_window", heads=4, head_dim=8, sinks=2)
    with pytest.raises(ValueError, match="state is a KeyValueCache; sliding_window decodes with"):
        sinks.step(q, k, v, attnzoo.build("standard", heads=4, head_dim=8).init_state(2))


@USUAL
def test_bytes_held_are_those_of_the_next_token_and_a_reserve(case: Case) -> None:
    """A long prefill leaves no buffer behind that a window has no use for."""
    attn = case.build(**sized(case.variant, 1201))
    q, k, v = (torch.randn(1, 4, 1200, 8) + case.shift for _ in range(3))
    with torch.no_grad():
        _, state = attn.step(q, k, v, attn.init_state(1))
        _, state = attn.step(q[:, :, :1], k[:, :, :1], v[:, :, :1], state)
    needed = attn.cost(1, 1201, is_causal=True).state_bytes
    copies = getattr(state, "keys", None)  # keys as they are read, beside keys as they came
    copied = 0 if copies is None else sum(x.nbytes for x in copies.tensors())
    sums = getattr(state, "sums", None)  # of blocks of these keys, beside them
    copied += 0 if sums is None else sums.nbytes()
    assert needed <= state.held_bytes() <= 2 * needed + copied + 70 * 2 * 4 * 8 * 4
