"""The last tokens can be taken back: stepping on from a cropped state equals the run without
them."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Case, Situation, close, padding, tensors, usual_cases
from small import build_small
from stages import in_turn, only
from torch import Tensor

import attnzoo
from attnzoo.engines.state_checks import GOES_BACK
from attnzoo.registry import spec_of

CASES = [
    *(case for case in usual_cases() if case.spec.decodes),
    Case("sliding_window", {"window": 5}),
    Case("sliding_window", {"window": 6, "sinks": 3}),
    Case("longformer", {"window": 5, "global_tokens": 2}),
]
ALL = pytest.mark.parametrize("case", CASES, ids=str)
TOLERANCE = 1e-12


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Run:
    """A run of tokens cut from one text: which have been taken, and the state behind them."""

    def __init__(self, case: Case, kind: str = "none", length: int = 90) -> None:
        self.attn = case.build(dtype=torch.float64)
        self.q, self.k, self.v, _ = tensors(Situation(length, length), shift=case.shift)
        self.mask = padding(kind, 2, length)
        self.inputs: dict[str, Tensor] = {}
        self.empty = self.attn.init_state(2, kv_heads=2, dtype=torch.float64)

    def _of(self, slots: list[int]) -> dict[str, Any]:
        inputs = {name: x[:, slots] for name, x in self.inputs.items()}
        return {"key_mask": None if self.mask is None else self.mask[:, slots], **inputs}

    def step(self, state: Any, slots: list[int]) -> tuple[Tensor, Any]:
        q, k, v = (x[:, :, slots] for x in (self.q, self.k, self.v))
        return self.attn.step(q, k, v, state, **self._of(slots))

    def whole(self, slots: list[int]) -> Tensor:
        q, k, v = (x[:, :, slots] for x in (self.q, self.k, self.v))
        return self.attn(q, k, v, is_causal=True, **self._of(slots))


def span(start: int, end: int) -> list[int]:
    return list(range(start, end))


@pytest.mark.parametrize(
    ("case", "prompt", "kind"),
    in_turn(
        [(case, prompt) for case in CASES for prompt in (2, 30)],
        ["none", "left", "right", "interior"],
    ),
)
def test_the_run_without_the_tokens(case: Case, kind: str, prompt: int) -> None:
    """Every number of tokens of a call, in one go and in two, then several steps; both the cropped
    and the old state go on, and each crop is of the state as it was."""
    run = Run(case, kind)
    state = run.step(run.empty, span(0, prompt))[1] if prompt else run.empty
    _, drafted = run.step(state, span(prompt, prompt + 9))
    for n in (0, 1, 4, 8, 9):
        left = span(0, prompt + 9 - n)
        for cropped in (drafted.crop(n), drafted.crop(n // 2).crop(n - n // 2)):
            assert cropped.seen == len(left) and cropped.batch_size == 2
            after, rows = cropped, []
            for more in (span(60, 61), span(61, 75), span(75, 76)):
                out, after = run.step(after, more)
                rows.append(out)
            expected = run.whole([*left, *span(60, 76)])
            close(torch.cat(rows, 2), expected[:, :, -16:], TOLERANCE, f"rows behind crop({n})")
    out, _ = run.step(drafted, span(60, 76))
    expected = run.whole([*span(0, prompt + 9), *span(60, 76)])
    close(out, expected[:, :, -16:], TOLERANCE, "rows behind the old state")


@ALL
def test_speculative_decoding(case: Case) -> None:
    """Drafts of several tokens, of which some are taken back each time, again and again."""
    run = Run(case, "left", 200)
    taken, state, start = span(0, 40), run.step(run.empty, span(0, 40))[1], 40
    for turn in range(20):
        draft = span(start, start + 1 + turn % 7)
        rows, state = run.step(state, draft)
        expected = run.whole([*taken, *draft])[:, :, -len(draft) :]
        close(rows, expected, TOLERANCE, f"rows of draft {turn}")
        n = turn * 3 % (len(draft) + 1)
        state, start = state.crop(n), start + len(draft)
        taken += draft[: len(draft) - n]
    assert state.seen == len(taken)


@pytest.mark.parametrize("case", only([*CASES[::3], *CASES[-3:]], CASES))
def test_a_long_call_keeps_its_end_alone(case: Case) -> None:
    """A bounded state holds as much after a prefill of 900 tokens as after one of 400, a tree of
    states one more, and both take back as many of either."""
    run, held = Run(case, length=920), []
    costs = [run.attn.cost(1, length, is_causal=True) for length in (448, 896)]
    bounded = costs[1].state_growth == 0
    for length in (448, 896):
        _, state = run.step(run.empty, span(0, length))
        held.append(state.held_bytes())
        for n in (1, 65, GOES_BACK):
            out, _ = run.step(state.crop(n), span(900, 907))
            expected = run.whole([*span(0, length - n), *span(900, 907)])
            close(out, expected[:, :, -7:], TOLERANCE, f"rows behind crop({n})")
        if bounded:
            with pytest.raises(ValueError, match=f"n={GOES_BACK + 1} must be .* 0 to {GOES_BACK},"):
                state.crop(GOES_BACK + 1)
        else:
            assert state.crop(length).seen == 0
    assert (held[0] == held[1]) == (costs[0].state_bytes == costs[1].state_bytes)


@ALL
def test_what_cannot_be_taken_back(case: Case) -> None:
    run = Run(case)
    with pytest.raises(ValueError, match=r"n=1 must be a whole number from 0 to 0,"):
        run.empty.crop(1)
    _, state = run.step(run.step(run.empty, span(0, 30))[1], span(30, 37))
    for n in (-1, 2.0, True, None, "3", 38):
        with pytest.raises(ValueError, match=rf"n={n!r} must be .* keep the state from before"):
            state.crop(n)
    if spec_of(case.variant).family == "kernel":
        with pytest.raises(ValueError, match="n=3 must be a whole number from 0 to 2"):
            state.crop(5).crop(3)


@ALL
@pytest.mark.parametrize("kind", ["none", "interior"])
def test_the_caller_may_write_over_its_tensors(case: Case, kind: str) -> None:
    run = Run(case, kind)
    q, k, v = (x[:, :, :20].clone() for x in (run.q, run.k, run.v))
    mask = None if run.mask is None else run.mask[:, :20].clone()
    _, state = run.attn.step(q, k, v, run.empty, key_mask=mask)
    for x in (q, k, v, mask):
        if x is not None:
            x.zero_()
    out, _ = run.step(state.crop(6), span(60, 66))
    expected = run.whole([*span(0, 14), *span(60, 66)])
    close(out, expected[:, :, -6:], TOLERANCE, "rows")


@ALL
def test_selected_copied_and_pickled_states_go_back(case: Case) -> None:
    run, rows = Run(case, "left"), torch.tensor([1, 1, 0])
    _, state = run.step(run.step(run.empty, span(0, 30))[1], span(30, 42))
    expected = run.whole([*span(0, 35), *span(60, 66)])[:, :, -6:]
    slots = span(60, 66)
    q, k, v = (x[rows][:, :, slots] for x in (run.q, run.k, run.v))
    mask = run.mask[rows][:, slots]  # type: ignore[index]
    for chosen in (state.select(rows).crop(7), state.crop(7).select(rows)):
        assert chosen.elements() * 2 == state.elements() * 3 or not hasattr(state, "numbers")
        out, _ = run.attn.step(q, k, v, chosen, key_mask=mask)
        close(out, expected[rows], TOLERANCE, "rows of the selected state")
    first, second = pickle.loads(pickle.dumps((state, state.crop(7))))
    for other in (copy.deepcopy(state).crop(7), copy.copy(state).crop(7), second, first.crop(7)):
        close(run.step(other, slots)[0], expected, TOLERANCE, "rows of a copy")
    out, _ = run.step(first, slots)
    expected = run.whole([*span(0, 42), *slots])[:, :, -6:]
    close(out, expected, TOLERANCE, "rows of the other state of the pickle")


@ALL
def test_a_bad_token_can_be_taken_back(case: Case) -> None:
    run = Run(case)
    _, state = run.step(run.empty, span(0, 30))
    expected = run.whole([*span(0, 33), *span(60, 66)])[:, :, -6:]
    run.k[:, :, 33] = run.v[:, :, 33] = float("nan")
    _, state = run.step(state, span(30, 36))
    out, _ = run.step(state.crop(3), span(60, 66))
    close(out, expected, TOLERANCE, "rows behind it")


@pytest.mark.parametrize("late", [False, True])
def test_global_tokens_of_the_cropped_call(late: bool) -> None:
    """Those taken back are global no more, in each sample others; those that are left stay."""
    run = Run(Case("longformer", {"window": 16, "global_tokens": 0}), "left", 60)
    if late:
        run.mask = None
    named = torch.zeros(2, 60, dtype=torch.bool)
    named[0, [2, 9, 11]] = named[1, [8, 10, 12, 13]] = True
    run.inputs["global_mask"] = named if run.mask is None else named & run.mask
    state = run.step(run.empty, span(0, 6))[1] if late else run.empty
    _, state = run.step(state, span(6 if late else 0, 15))
    for n in range(0, 10, 3):
        slots = [*span(0, 15 - n), *span(40, 55)]
        cropped = state.crop(n)
        out, _ = run.step(cropped, span(40, 55))
        close(out, run.whole(slots)[:, :, -15:], TOLERANCE, f"rows behind crop({n})")
        some = int(run._of(slots)["global_mask"].sum(1).amax())
        assert cropped.kept == some


def test_bit_for_bit_where_nothing_is_added_in_another_order() -> None:
    """A cache of keys always, sums where the whole call goes, or one token of a run of tokens."""
    for name in ("standard", "sliding_window", "linear", "retention", "performer"):
        run = Run(Case(name), length=64)
        _, state = run.step(run.empty, span(0, 30))
        _, longer = run.step(state, span(30, 60))
        out, _ = run.step(longer.crop(30), span(60, 64))
        assert torch.equal(out, run.step(state, span(60, 64))[0])
        _, one = run.step(state, [30])
        _, two = run.step(state, [30, 31])
        out, _ = run.step(two.crop(1), [60])
        assert torch.equal(out, run.step(one, [60])[0])


@pytest.mark.parametrize("name", ["standard", "sliding_window"])
def test_slots_are_written_again_where_no_other_state_reads_them(name: str) -> None:
    """Drafting and taking back copies no key; a snapshot makes it copy once, and holds."""
    run = Run(Case(name, {"window": 60} if name == "sliding_window" else {}))
    _, state = run.step(run.empty, span(0, 20))
    _, state = run.step(state, span(20, 22))
    buffer, taken = state.buffer, span(0, 22)
    for turn in range(8):
        _, state = run.step(state, span(22 + turn, 25 + turn))
        state = state.crop(2)
        taken.append(22 + turn)
        assert state.buffer is buffer
    snapshot, held = state, run.whole([*taken, 60])[:, :, -1:]
    _, state = run.step(state, [70, 71])
    assert state.buffer is buffer  # what comes behind a snapshot is none of its slots
    older, of_older = state, run.whole([*taken, 70, 71, 60])[:, :, -1:]
    _, state = run.step(state.crop(1), [72])
    assert state.buffer is not buffer  # what stands in the snapshot's slots is
    out, _ = run.step(state, [60])
    close(out, run.whole([*taken, 70, 72, 60])[:, :, -1:], TOLERANCE, "the new branch")
    close(run.step(older, [60])[0], of_older, TOLERANCE, "the longer snapshot")
    close(run.step(snapshot, [60])[0], held, TOLERANCE, "the snapshot")
    del older
    gc.collect()
    _, state = run.step(snapshot, [73])
    assert state.buffer is buffer  # the longer one is gone
    close(run.step(snapshot, [60])[0], held, TOLERANCE, "the snapshot, once more")


def test_a_cache_that_autograd_has_saved_is_not_written() -> None:
    run = Run(Case("standard"))
    run.q = run.q[:, :2].requires_grad_()  # a key a query, so that no copy of the keys is saved
    run.attn = attnzoo.build("standard", heads=2, head_dim=8)
    with torch.enable_grad():
        rows, state = run.step(run.empty, span(0, 20))
    state = state.crop(5)  # no state reads these slots any more, but the backward pass will
    run.step(state, span(60, 64))
    with torch.enable_grad():
        found = torch.autograd.grad(rows.sum(), run.q)[0]
        expected = torch.autograd.grad(run.whole(span(0, 20)).sum(), run.q)[0]
    close(found, expected, 1e-10, "gradient of q")


@ALL
def test_gradients_flow_through_what_is_left(case: Case) -> None:
    run = Run(case)
    run.k.requires_grad_()
    with torch.enable_grad():
        _, state = run.step(run.step(run.empty, span(0, 12))[1], span(12, 20))
        out, _ = run.step(state.crop(3), span(60, 64))
        expected = run.whole([*span(0, 17), *span(60, 64)])[:, :, -4:]
        found = torch.autograd.grad(out.square().sum(), run.k)[0]
        close(found, torch.autograd.grad(expected.square().sum(), run.k)[0], 1e-10, "gradient of k")


def test_half_precision_goes_back() -> None:
    for name in ("linear", "sliding_window"):
        attn = build_small(name, 2, 8)
        q, k, v = torch.rand(3, 1, 2, 30, 8).to(torch.bfloat16)
        _, state = attn.step(q, k, v, attn.init_state(1, dtype=torch.bfloat16))
        new = [x[:, :, 3:4] for x in (q, k, v)]
        out, _ = attn.step(new[0], new[1], new[2], state.crop(10))
        early = [x[:, :, :20] for x in (q, k, v)]
        _, other = attn.step(early[0], early[1], early[2], attn.init_state(1, dtype=q.dtype))
        assert torch.equal(out, attn.step(new[0], new[1], new[2], other)[0])


def test_what_a_model_was_built_with_stays_the_limit() -> None:
    """Tokens taken back no longer count against max_length."""
    attn = attnzoo.build("linear", heads=2, head_dim=4)
    x = torch.rand(1, 2, 6, 4)
    _, state = attn.step(x, x, x, attn.init_state(1, 6))
    two = x[:, :, :2]
    out, state = attn.step(two, two, two, state.crop(2))
    assert state.seen == 6 and out.shape[2] == 2
    with pytest.raises(ValueError, match="max_length=6"):
        attn.step(x, x, x, state)


@pytest.mark.parametrize("name", ["standard", "sliding_window", "linear"])
@torch.enable_grad()
def test_a_state_keeps_nothing_of_the_callers(name: str) -> None:
    """With gradients too, a caller may write over its keys after the step."""
    attn = attnzoo.build(name, heads=2, head_dim=4)
    q, k, v = (torch.randn(1, 2, 6, 4) for _ in range(3))
    q.requires_grad_()
    first, last = slice(0, 5), slice(5, 6)
    wanted = attn(q, k, v, is_causal=True)[:, :, last]
    early_k, early_v = k[:, :, first].clone(), v[:, :, first].clone()
    _, state = attn.step(q[:, :, first], early_k, early_v, attn.init_state(1))
    early_k.fill_(7.0)
    early_v.fill_(7.0)
    out, _ = attn.step(q[:, :, last], k[:, :, last], v[:, :, last], state)
    torch.testing.assert_close(out, wanted)


@torch.enable_grad()
def test_keys_that_stay_keep_their_history() -> None:
    """Wherever tokens are taken back."""
    attn = attnzoo.build("sliding_window", heads=2, head_dim=4, window=2, sinks=2)
    q, k, v = (torch.randn(1, 2, 7, 4, requires_grad=True) for _ in range(3))
    gradients = []
    for learns in (True, False):
        early, late = slice(0, 6), slice(6, 7)
        empty = attn.init_state(1)
        _, state = attn.step(q[:, :, early], k[:, :, early], v[:, :, early], empty)
        with torch.set_grad_enabled(learns):
            state = state.crop(1)
        out, _ = attn.step(q[:, :, late], k[:, :, late], v[:, :, late], state)
        gradients.append(torch.autograd.grad(out.sum(), v)[0])
    assert torch.equal(*gradients) and bool(gradients[0][:, :, :2].ne(0).any())


@pytest.mark.parametrize("name", ["moba", "nsa"])
def test_blocks_summed_once_are_summed_again_where_their_tokens_went(name: str) -> None:
    attn = build_small(name, 2, 8)
    torch.manual_seed(0)
    q, k, v, other = (torch.randn(1, 2, 26, 8) * 3 for _ in range(4))
    _, state = attn.step(q[:, :, :10], k[:, :, :10], v[:, :, :10], attn.init_state(1))
    for token in range(10, 20):
        here = slice(token, token + 1)
        _, state = attn.step(q[:, :, here], other[:, :, here], other[:, :, here], state)
    state, rows = state.crop(9), []
    k[:, :, 10], v[:, :, 10] = other[:, :, 10], other[:, :, 10]
    for token in range(11, 26):
        here = slice(token, token + 1)
        row, state = attn.step(q[:, :, here], k[:, :, here], v[:, :, here], state)
        rows.append(row)
    assert state.sums is not None and state.sums.k.shape[2] == 26 // state.sums.size
    whole = attn(q, k, v, is_causal=True)
    torch.testing.assert_close(torch.cat(rows, 2), whole[:, :, 11:])
