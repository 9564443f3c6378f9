"""Padding is absence (rule 4): a left- or right-padded run equals the run without the padding."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import (
    Case,
    Situation,
    backends_of,
    can,
    cases,
    close,
    gradients_of,
    padding,
    tensors,
    usual_cases,
)
from stages import in_turn, only, staged
from torch import Tensor

from attnzoo import Attention

LENGTHS = (40, 200)
TOLERANCE = 1e-11


def alone(attn: Attention, mask: Tensor, q: Tensor, k: Tensor, v: Tensor, **kind: bool) -> Tensor:
    """Every sample without its padding, run by itself and put back where its tokens stand."""
    out = torch.zeros_like(q)
    for sample, real in enumerate(mask):
        one = slice(sample, sample + 1)
        rows = attn(*(x[one][:, :, real] for x in (q, k, v)), **kind)
        out = out.index_put(
            (
                torch.tensor([sample]),
                *torch.meshgrid(torch.arange(q.shape[1]), real.nonzero()[:, 0], indexing="ij"),
            ),
            rows[0],
        )
    return out


@pytest.mark.parametrize(
    ("case", "side", "length"),
    [
        staged(
            case,
            side,
            length,
            # The usual forms short or long, all on one side, in turn
            first=length == LENGTHS[place // 2 % 2 if case in usual_cases() else 0]
            and place % 2 == number,
        )
        for place, case in enumerate(cases())
        for number, side in enumerate(("left", "right"))
        for length in LENGTHS
        # Forms beside the usual ones are long on one side, in turn
        if length == LENGTHS[0] or case in usual_cases() or place % 2 == number
    ],
)
def test_padded_equals_alone(case: Case, side: str, length: int) -> None:
    """Outputs and gradients of the real rows, by every backend, though the padding holds NaN. What
    the samples are alone is computed once, by the backend that auto takes."""
    mask = padding(side, 2, length)
    assert mask is not None
    real = mask[:, None, :, None]
    attn = case.build(dtype=torch.float64)
    names = ["q", "k", "v", *(name for name, _ in attn.named_parameters())]
    for is_causal in case.spec.forms:
        q, k, v, upstream = tensors(Situation(length, length), shift=case.shift)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        expected = alone(attn, mask, q, k, v, is_causal=is_causal)
        wanted = gradients_of(expected, upstream * real, *leaves, *attn.parameters())
        for backend in backends_of(case):
            padded = case.build(dtype=torch.float64, prefer=backend)
            bad = [x.detach().masked_fill(~real, float("nan")).requires_grad_() for x in (k, v)]
            out = padded(q, *bad, key_mask=mask, is_causal=is_causal)
            found = gradients_of(out, upstream * real, q, *bad, *padded.parameters())
            how = f"{backend}, {is_causal=}"
            close(
                torch.where(real, out, 0.0),
                expected,
                TOLERANCE,
                f"rows of a run padded on the {side}, {how}",
            )
            for name, one, other in zip(names, found, wanted, strict=True):
                close(one, other, TOLERANCE, f"gradient of {name}, {how}")


PROMPT, PIECES = (150, *[1] * 10), (3, 60, 1, 1, 90, 1, 4)


@pytest.mark.parametrize(
    ("case", "side", "pieces"),
    in_turn(
        [case for case in cases() if case.spec.decodes],
        [("left", PROMPT), ("right", PIECES), ("left", PIECES), ("right", PROMPT)],
    ),
)
def test_padded_decoding_equals_alone(case: Case, side: str, pieces: tuple[int, ...]) -> None:
    """Rows of a padded prompt and of the tokens behind it, told in pieces."""
    length = sum(pieces)
    mask = padding(side, 3, length)
    assert mask is not None
    if side == "right":  # tokens that go on behind a padded one would not be the last
        mask[:, 150:] = False
    attn = case.build(dtype=torch.float64)
    q, k, v, _ = tensors(Situation(length, length, batch=3), shift=case.shift)
    state, rows = attn.init_state(3, kv_heads=2, dtype=q.dtype), []
    cut = partial(torch.split, split_size_or_sections=list(pieces), dim=2)
    for q_now, k_now, v_now, mask_now in zip(
        cut(q), cut(k), cut(v), mask.split(list(pieces), 1), strict=True
    ):
        out, state = attn.step(
            q_now, k_now, v_now, state, key_mask=None if bool(mask_now.all()) else mask_now
        )
        rows.append(out)
    found = torch.cat(rows, 2) * mask[:, None, :, None]
    close(
        found,
        alone(attn, mask, q, k, v, is_causal=True),
        TOLERANCE,
        f"rows of a prompt padded on the {side}",
    )


COUNTING = [
    Case("bigbird", {"block_size": 4, "num_random_blocks": 2}),
    Case("sliding_window", {"window": 7, "sinks": 3}),
    Case("sparse_transformer", {"stride": 8, "pattern": "fixed", "expressivity": 2}),
    Case("linformer", {"rank": 16}),
    Case("longformer", {"window": 16, "global_tokens": 3}),
    Case("retention"),
]


@pytest.mark.parametrize("case", only(COUNTING[:1], COUNTING))
def test_padded_equals_alone_where_no_value_may_be_looked_at(case: Case) -> None:
    """A graph that cannot be broken moves every sample, whatever its mask says: one serves both
    sides."""
    torch._dynamo.reset()
    attn = case.build(dtype=torch.float64)
    compiled = torch.compile(attn, backend="eager", fullgraph=True)
    for is_causal in (False, True):
        if can(case.spec, is_causal):
            q, k, v, _ = tensors(Situation(60, 60, batch=3), shift=case.shift)
            for side in ("left", "right"):
                mask = padding(side, 3, 60)
                assert mask is not None
                out = compiled(q, k, v, key_mask=mask, is_causal=is_causal) * mask[:, None, :, None]
                expected = alone(attn, mask, q, k, v, is_causal=is_causal)
                close(out, expected, TOLERANCE, f"rows of a graph, {side}, {is_causal=}")


def test_padding_inside_neither_fades_nor_moves_first_tokens() -> None:
    """Retention's decay and a window's sinks count real tokens, wherever padding stands."""
    mask = padding("interior", 2, 90)
    assert mask is not None
    mask[:, :2] = False
    q, k, v, _ = tensors(Situation(90, 90))
    retention = Case("retention").build(dtype=torch.float64)
    out = retention(q, k, v, key_mask=mask, is_causal=True) * mask[:, None, :, None]
    close(out, alone(retention, mask, q, k, v, is_causal=True), TOLERANCE, "rows of retention")
    sinks = Case("sliding_window", {"window": 1, "sinks": 3}).build(dtype=torch.float64)
    seen = sinks.weights(q, k, key_mask=mask, is_causal=True)[:, 0, -1].nonzero()
    first = [
        [sample, slot] for sample in range(2) for slot in mask[sample].nonzero()[:3, 0].tolist()
    ]
    assert [pair for pair in seen.tolist() if pair[1] != 89] == first


#: Five blocks, of which every row sees every one; four that are real, of which a row behind them
#: does not.
ALL_BUT_SEEN = Case("bigbird", {"block_size": 3, "num_random_blocks": 1})


@pytest.mark.parametrize(
    ("case", "queries"),
    in_turn(
        [*(case for case in cases() if case.spec.cross), ALL_BUT_SEEN],
        [1, 6, 10, 30],
        whole=[ALL_BUT_SEEN],
    ),
)
def test_queries_of_their_own_and_padded_keys(case: Case, queries: int) -> None:
    """Keys padded on the left change no row of other queries; by every backend, padded on the right
    as by the reference."""
    for is_causal in (causal for causal in (False, True) if can(case.spec, causal)):
        q, k, v, _ = tensors(Situation(queries, 14, batch=1), shift=case.shift)
        left, right = torch.arange(14)[None] >= 5, torch.arange(14)[None] < 10
        reference = case.build(dtype=torch.float64, backend="reference")
        for backend in backends_of(case):
            attn = case.build(dtype=torch.float64, prefer=backend)
            cut = attn(q, k[:, :, 5:], v[:, :, 5:], is_causal=is_causal)
            close(
                attn(q, k, v, key_mask=left, is_causal=is_causal),
                cut,
                TOLERANCE,
                f"rows over padded keys, {backend}, {is_causal=}",
            )
            close(
                attn(q, k, v, key_mask=right, is_causal=is_causal),
                reference(q, k, v, key_mask=right, is_causal=is_causal),
                TOLERANCE,
                f"rows over keys padded on the right, {backend}, {is_causal=}",
            )
