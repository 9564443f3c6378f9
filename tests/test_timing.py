"""Timing takes turns and refuses a wrong backend; memory is what the allocator handed out."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from small import possible
from toys import Uniform, Wrong

import attnzoo
from attnzoo.benchmarking import Timing, interleave, mistake, peak_bytes
from attnzoo.benchmarking.timing import MINIMUM_ROUNDS
from attnzoo.registry import sized


def test_contenders_take_turns_after_the_warm_up() -> None:
    order: list[str] = []
    timings = interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmups=1
    )
    assert order == ["a", "b"] * 4
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3}


def test_time_is_in_seconds() -> None:
    timing = interleave({"sleep": lambda: time.sleep(0.02)}, rounds=3)["sleep"]
    assert 0.02 <= timing.median < 0.2


def test_a_spent_budget_ends_the_rounds_but_not_before_the_third() -> None:
    seen: list[tuple[int, int]] = []
    timings = interleave(
        {"sleep": lambda: time.sleep(0.005)},
        rounds=50,
        budget=0.0,
        progress=lambda done, rounds: seen.append((done, rounds)),
    )
    assert len(timings["sleep"].seconds) == MINIMUM_ROUNDS
    assert seen == [(1, 50), (2, 50), (3, 50)]


def test_another_stopwatch_takes_the_times() -> None:
    runs: list[str] = []

    def stopwatch(call: Callable[[], object]) -> float:
        call()
        return float(len(runs))

    assert interleave({"a": lambda: runs.append("a")}, rounds=3, warmups=1, stopwatch=stopwatch)[
        "a"
    ].seconds == (2.0, 3.0, 4.0)


def test_median_and_quartiles() -> None:
    assert Timing((4.0, 1.0, 2.0, 3.0, 5.0)).median == 3.0
    assert Timing((4.0, 1.0, 2.0, 3.0, 5.0)).quartiles == (2.0, 4.0)
    assert Timing((4.0,)).quartiles == (4.0, 4.0)


def test_no_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match="rounds=0 must be at least 1"):
        interleave({}, rounds=0)


@pytest.mark.parametrize("name", attnzoo.names())
def test_every_variant_agrees_with_its_own_reference(name: str) -> None:
    attention = attnzoo.build(name, heads=4, head_dim=16, **sized(name, 300)).eval()
    q, k, v = torch.randn(2, 4, 300, 16), torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 16)
    masks = possible(attention.spec)
    attention(q, k, v, **masks)
    assert mistake(attention, q, k, v, **masks) is None


def test_a_wrong_backend_is_found_out() -> None:
    q, k, v = torch.randn(3, 1, 2, 40, 8)
    for toy, wrong in ((Uniform(2, 8), False), (Wrong(2, 8), True)):
        toy(q, k, v)
        found = mistake(toy, q, k, v, is_causal=True)
        assert found == (
            "backend fast is off its reference by 1 (allowed 0.0001 in float32)" if wrong else None
        )


def test_the_check_sees_a_batch_of_its_own_kind() -> None:
    """Of several samples two, not one: a compiled backend takes one sample for a shape of another
    kind and compiles anew."""
    attention, batches = attnzoo.build("standard", heads=2, head_dim=8), []
    attention.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    for batch_size, checked in ((1, 1), (2, 2), (8, 2)):
        q, k, v = torch.randn(3, batch_size, 2, 40, 8)
        attention(q, k, v)
        batches.clear()
        assert mistake(attention, q, k, v, is_causal=True) is None
        assert set(batches) == {checked}


def test_a_backend_that_gives_nan_is_found_out() -> None:
    attention = attnzoo.build("standard", heads=2, head_dim=8)
    q, k, v = torch.randn(3, 1, 2, 40, 8)
    attention(q, k, v)
    assert mistake(attention, q * float("nan"), k, v, is_causal=False) is not None


def test_peak_is_the_highest_sum_of_what_is_held_at_once() -> None:
    x = torch.randn(1000, 1000)  # 4,000,000 bytes

    def two_at_once() -> torch.Tensor:
        first = x + 1
        second = first + 1
        del first
        third = second + 1
        return third

    two_at_once()
    assert 8_000_000 <= peak_bytes(two_at_once) < 8_010_000


def test_what_lay_there_before_does_not_count() -> None:
    x = torch.randn(1000, 1000)
    assert peak_bytes(lambda: x.add_(1)) < 10_000


def test_exact_attention_peaks_at_its_scores_and_sdpa_does_not() -> None:
    q = torch.randn(1, 1, 1024, 16)
    scores = 1024 * 1024 * 4
    peaks = {}
    for name in ("sdpa", "reference"):
        attention = attnzoo.build("standard", heads=1, head_dim=16, backend=name)
        peaks[name] = peak_bytes(partial(attention, q, q, q))
    assert peaks["sdpa"] < scores / 2 < scores < peaks["reference"]


def test_memory_of_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="tracked on 'cpu' and 'cuda' only"):
        peak_bytes(lambda: None, "meta")
