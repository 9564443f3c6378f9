"""Time, told honestly: every contender runs in every round, and none gets a time before its result is checked."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.attention import Attention
from attnzoo.call import UnsupportedError

#: Allowed ||fast - reference||_F / ||reference||_F by dtype: some hundred roundings, far below what a wrong kernel gives.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
CHECK_LENGTH = 257
MINIMUM_ROUNDS = 3  # a median of fewer says nothing


Stopwatch = Callable[[Callable[[], object]], float]


def wall_clock(call: Callable[[], object]) -> float:
    """Seconds of one call by the processor's clock."""
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) * 1e-9


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender, one number a round, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile (of one round: that round)."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 7,
    warmups: int = 1,
    budget: float | None = None,
    stopwatch: Stopwatch = wall_clock,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Timing]:
    """Time contenders in turns, A B C A B C ..., so that a slow minute of the machine slows all of them alike.

    rounds: times that each contender is timed; warmups: untimed turns before. budget: seconds of timing after which no new round is
    begun, once there are 3 (or `rounds`, if fewer). stopwatch: runs one call and returns its seconds (on CUDA: `attnzoo.bench.cuda.EventClock`).
    progress: called with (rounds done, rounds) after each. Raises ValueError when rounds is not at least 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    for _ in range(warmups):
        for call in contenders.values():
            call()
    begun = time.perf_counter()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for done in range(1, rounds + 1):
        for name, call in contenders.items():
            seconds[name].append(stopwatch(call))
        if progress is not None:
            progress(done, rounds)
        if budget is not None and done >= MINIMUM_ROUNDS and time.perf_counter() - begun > budget:
            break
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}


def mistake(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, length: int = CHECK_LENGTH, backward: bool = False
) -> str | None:
    """Why `attention`'s last backend must get no time, or None when it agrees with its own reference.

    Call it after a forward. Both run on the first `length` tokens of the first batch entry; where the backend refuses that
    length, on the whole entry. Agreement: a relative Frobenius error within `TOLERANCE` of the dtype. backward: the gradients of q, k and v
    must agree too.
    """
    fast, reference = copy.deepcopy(attention), copy.deepcopy(attention)
    fast.backend, reference.backend = attention.last_backend or "auto", "reference"
    for stop in (min(length, q.shape[2]), q.shape[2]):
        part = [x[:1, :, :stop] for x in (q, k, v)]
        try:
            answers = zip(_answers(fast, part, is_causal, backward), _answers(reference, part, is_causal, backward), strict=True)
        except UnsupportedError:
            continue
        for what, (found, wanted) in zip(("", "'s gradient of q", "'s gradient of k", "'s gradient of v"), answers, strict=False):
            wrong = disagreement(found, wanted)
            if wrong is not None:
                return f"backend {fast.backend}{what} is off its reference by {wrong}"
        return None
    return f"backend {fast.backend} refuses the shapes on which it could be checked"


def disagreement(found: Tensor, wanted: Tensor) -> str | None:
    """The relative Frobenius error beside what the dtype allows, or None when it is within that."""
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-300))
    tolerance = TOLERANCE[found.dtype]
    return None if error <= tolerance else f"{error:.2g} (allowed {tolerance:g} in {str(found.dtype).removeprefix('torch.')})"


def _answers(attention: Attention, part: Sequence[Tensor], is_causal: bool, backward: bool) -> list[Tensor]:
    """The output, and the gradients of q, k and v when asked for."""
    with torch.set_grad_enabled(backward):
        leaves = [x.detach().requires_grad_(backward) for x in part]
        out = attention(*leaves, is_causal=is_causal)
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(out.shape, generator=generator).to(out)
        return [out.detach(), *(torch.autograd.grad(out, leaves, direction, materialize_grads=True) if backward else ())]
