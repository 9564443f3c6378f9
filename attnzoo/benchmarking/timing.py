"""Time in interleaved rounds: every contender runs in every round, and none is timed before its
result is checked."""

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

#: Allowed ||fast - reference||_F / ||reference||_F by dtype: some hundred roundings, far below what
#: a wrong kernel gives.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
WHOLE_LENGTH = 1024  # up to which every row is checked
# Of longer inputs: tokens up to which every row is checked, and rows of the full length.
CHECK_LENGTH, SAMPLED_ROWS = (257, 64)
CHECKED_SAMPLES = 2
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
    """Time contenders in turns, A B C A B C ..., so that a slow minute of the machine slows all of
    them alike.

    rounds: times that each contender is timed.
    warmups: untimed turns before.
    budget: seconds of timing after which no new round is begun, once there are 3 (or `rounds`, if
    fewer).
    stopwatch: runs one call and returns its seconds (on CUDA:
    `attnzoo.benchmarking.cuda_timing.EventClock`).
    progress: called with (rounds done, rounds) after each.
    Raises ValueError when rounds is not at least 1.
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
    attention: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool,
    backward: bool = False,
    segments: Tensor | None = None,
) -> str | None:
    """Why `attention`'s last backend must get no time, or None when it agrees with its own
    reference.

    Call it after a forward. Both run on the first `CHECKED_SAMPLES` batch entries: not on one, for
    which a compiled backend would compile anew. Up to `WHOLE_LENGTH` tokens every row is compared;
    beyond, every row of the first `CHECK_LENGTH` tokens (where the backend takes so few), and at
    the full length `SAMPLED_ROWS` last rows, causal as many about the middle too: a row asks the
    reference for its own scores only. Agreement: a relative Frobenius error within `TOLERANCE` of
    the dtype.

    backward: the gradients of q, k and v, from those rows, must agree too.
    segments: (batch, length), the pieces of packed rows, which are compared whole.
    """
    fast, reference = copy.deepcopy(attention), copy.deepcopy(attention)
    fast.backend, reference.backend = attention.last_backend or "auto", "reference"
    inputs = [x[:CHECKED_SAMPLES] for x in (q, k, v)]
    length = q.shape[2]
    prefix = length if length <= WHOLE_LENGTH or segments is not None else CHECK_LENGTH
    ids = None if segments is None else segments[:CHECKED_SAMPLES]
    try:
        wrong = _mistake_in(
            fast,
            reference,
            [x[:, :, :prefix] for x in inputs],
            [slice(0, prefix)],
            is_causal,
            backward,
            ids,
        )
    except UnsupportedError as error:
        if prefix == length:
            raise UnsupportedError(f"backend {fast.backend} cannot be checked: {error}") from None
        wrong = None
    if wrong is not None or prefix == length or not attention.spec.cross:
        return wrong
    ends = [length, length // 2 + 1] if is_causal else [length]
    return _mistake_in(
        fast,
        reference,
        inputs,
        [slice(end - SAMPLED_ROWS, end) for end in ends],
        is_causal,
        backward,
    )


def _mistake_in(
    fast: Attention,
    reference: Attention,
    inputs: Sequence[Tensor],
    parts: Sequence[slice],
    is_causal: bool,
    backward: bool,
    segments: Tensor | None = None,
) -> str | None:
    """What is wrong in some rows: `fast` gives all, the reference those rows alone, standing at the
    end of the keys that it is given."""
    with torch.set_grad_enabled(backward):
        leaves = [x.detach().requires_grad_(backward) for x in inputs]
        out = fast(*leaves, is_causal=is_causal, segments=segments)
        for rows in parts:
            ours = [x.detach().requires_grad_(backward) for x in inputs]
            wanted = reference(
                ours[0][:, :, rows],
                *(x[:, :, : rows.stop] for x in ours[1:]),
                is_causal=is_causal,
                segments=segments,
            )
            pairs = [("", out[:, :, rows].detach(), wanted.detach())]
            if backward:
                direction = torch.randn(
                    wanted.shape, generator=torch.Generator().manual_seed(0)
                ).to(wanted)
                found = torch.autograd.grad(
                    out[:, :, rows], leaves, direction, retain_graph=True, materialize_grads=True
                )
                gradients = torch.autograd.grad(wanted, ours, direction, materialize_grads=True)
                pairs += [
                    (f"'s gradient of {name}", *pair)
                    for name, *pair in zip("qkv", found, gradients, strict=True)
                ]
            for what, one, other in pairs:
                wrong = disagreement(one, other)
                if wrong is not None:
                    return f"backend {fast.backend}{what} is off its reference by {wrong}"
    return None


def disagreement(found: Tensor, wanted: Tensor) -> str | None:
    """The relative Frobenius error beside what the dtype allows, or None when it is within that."""
    error = float(
        (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-300)
    )
    tolerance = TOLERANCE[found.dtype]
    return (
        None
        if error <= tolerance
        else f"{error:.2g} (allowed {tolerance:g} in {str(found.dtype).removeprefix('torch.')})"
    )


def decoding_mistake(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why `attention` must get no time for decoding, or None: its last row after `step` by `step`
    against the reference's."""
    q, k, v = (x[:1] for x in (q, k, v))
    last = q.shape[2] - 1
    with torch.no_grad():
        state = attention.init_state(1, last + 1, dtype=q.dtype, device=q.device)
        if last:
            state = attention.step(q[:, :, :last], k[:, :, :last], v[:, :, :last], state)[1]
        found = attention.step(q[:, :, last:], k[:, :, last:], v[:, :, last:], state)[0]
        asked, attention.backend = attention.backend, "reference"
        try:
            wanted = attention(q[:, :, last:], k, v, is_causal=True)
        finally:
            attention.backend = asked
    wrong = disagreement(found, wanted)
    return None if wrong is None else f"a decoded row is off the reference by {wrong}"
