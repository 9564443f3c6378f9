"""Linear attention whose state fades, and is written by addition or by the delta rule.

A head carries a state of width × value_dim numbers. A token lets it fade by its log_decay, writes
to it as `tokens.Rule` says, and reads its row from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from attnzoo.call import Call, UnsupportedError
from attnzoo.engines.engine import Backend, Cost, Shape, StateSizes, never_refuses
from attnzoo.engines.linear.gated import (
    fla_kernels,
    gated_cost,
    gated_gradient,
)
from attnzoo.engines.linear.gated.gated_chunks import scan
from attnzoo.engines.linear.gated.recurrence import recur
from attnzoo.engines.linear.gated.reference import REFERENCE, GatedReference, reference
from attnzoo.engines.linear.gated.tokens import (
    REMOVAL_KEY,
    Rule,
    as_square,
    empty_state,
    prepared,
)
from attnzoo.engines.linear.native import compiled_recurrence, gated_native
from attnzoo.engines.linear.state import LinearState, Recent, early_and_late
from attnzoo.engines.linear.sums import Past
from attnzoo.engines.piece_by_piece import join
from attnzoo.engines.tried_on_gpu import never_ran

#: Tokens up to which A itself is faster than chunks, forward and backward, where a token adds its
#: value and heads fade; it is not by channel, nor reliably by the delta rule.
SHORT = 64
#: Backends of whole sequences, which carry no state.
WHOLE = ("fla", "short")


class GatedLinear(GatedReference):
    """Gates and delta rules, causal only.

    Its backends in order: `fla`, flash-linear-attention on CUDA, asked for by name; `native`, in
    C++, where that has been compiled; `short`, A itself where it is small; `chunked`, with a
    backward pass of its own; `open`, the same in operators that graphs and transforms can follow;
    the reference.

    rule: what a token does to the state
    slopes: by how much the state of every head fades at each token, where that is constant
    """

    counted_apart = True

    @property
    def state_type(self) -> type | None:
        return LinearState

    def init_state(self, sizes: StateSizes) -> LinearState:
        return LinearState(sizes.batch_size, sizes.kv_heads, sizes.max_length)

    def forward(
        self, call: Call, backend: str = "auto", state: LinearState | None = None
    ) -> tuple[Tensor, str, Any]:
        if state is None:
            return super().forward(call, backend)
        call = self.completed(call)
        name = self._decoder(call, backend)
        before = past = state.summed(self._after)
        if call.key_length == 1:
            ((rows, past),) = self._walk(call, before, name)
            after = state.after(call, past, Recent.of(call, before, state.recent))
            return rows.to(call.q.dtype), name, after
        parts = early_and_late(call)

        def pieces() -> Iterator[Tensor]:
            nonlocal before, past
            for part in parts:
                before = past
                for found in self._walk(part, before, name):
                    rows, past = found
                    yield rows.to(call.q.dtype)

        out = join(pieces(), call.key_length, 2)
        assert past is not None
        return out, name, state.after(call, past, Recent.of(parts[-1], before))

    def _decoder(self, call: Call, backend: str) -> str:
        """The backend that carries a state on."""
        if backend in WHOLE:
            raise UnsupportedError(f"backend={backend!r} does not decode; use backend='auto'")
        if backend != "auto":
            return self.choose(call, backend).name
        return next(
            one.name
            for one in self.backends
            if one.name not in WHOLE and one.reason(self, call, by_name=False) is None
        )

    def _walk(self, call: Call, past: Past | None, backend: str) -> Iterator[tuple[Tensor, Past]]:
        """Some rows at a time, and the past after them."""
        if backend == "native":
            rows, sums = gated_native.carried(self.rule, call, None if past is None else past.sums)
            yield rows, Past(sums, None)
            return
        state = empty_state(call) if past is None else past.sums
        if backend == "reference" or call.key_length == 1:
            found = recur(self.rule, prepared(self.rule, call), state)
        else:
            found = scan(self.rule, call, state, remember_last=True)
        for rows, sums in found:
            assert sums is not None  # since it is to be remembered
            yield rows, Past(sums, None)

    def _after(self, call: Call, past: Past | None) -> Past:
        """The past with the keys of a call."""
        *_, (_, after) = self._walk(call, past, "open")
        return after

    def cost(self, shape: Shape) -> Cost:
        found = gated_cost.cost(self.rule, shape, self.slopes is not None)
        if _too_long(self.rule, shape.key_length):
            return found
        return gated_cost.of_short(found, shape)


def _too_long(rule: Rule, length: int) -> str | None:
    """Why `short` does not take a call of so many tokens."""
    if rule.delta or rule.removes or rule.by_channel:
        return "A itself is no faster than chunks for a delta rule or gates of channels"
    if length > SHORT:
        return f"A itself is faster than chunks up to {SHORT} tokens, and there are {length}"
    return None


def _short(engine: GatedLinear, call: Call) -> Tensor:
    return as_square(partial(reference, engine), call)


def _short_why_not(engine: GatedLinear, call: Call) -> str | None:
    return _too_long(engine.rule, call.key_length)


def _chunked(engine: GatedLinear, call: Call) -> Tensor:
    return as_square(partial(gated_gradient.attend, engine.rule), call)


def _chunked_why_not(engine: GatedLinear, call: Call) -> str | None:
    return gated_gradient.why_not(call)


def _native(engine: GatedLinear, call: Call) -> Tensor:
    return as_square(partial(gated_native.attend, engine.rule), call)


def _native_why_not(engine: GatedLinear, call: Call) -> str | None:
    return compiled_recurrence.why_not(call)


def _native_skips_padding(engine: GatedLinear, call: Call) -> bool:
    """Whether what is removed is not made of keys, of which padded ones would be read."""
    return not engine.rule.removes or call.get(REMOVAL_KEY.name) is not None


def _native_passed_over(engine: GatedLinear, call: Call) -> str | None:
    return compiled_recurrence.passed_over(call)


def _open(engine: GatedLinear, call: Call) -> Tensor:
    return as_square(partial(gated_gradient.attend_openly, engine.rule), call)


GatedLinear.backends = (
    Backend("fla", fla_kernels.run, fla_kernels.why_not, untried=never_ran),
    Backend(
        "native",
        _native,
        _native_why_not,
        untried=_native_passed_over,
        skips_padding=_native_skips_padding,
    ),
    Backend("short", _short, _short_why_not, packs=True),
    Backend("chunked", _chunked, _chunked_why_not),
    Backend("open", _open, never_refuses, packs=True),
    REFERENCE,
)
