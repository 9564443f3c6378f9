"""Engine 3, linear: A_ij = φ(q_i) · φ(k_j), normalised, in time linear in the length.

A·v is computed through sums over the keys, a state of width × value_dim numbers a head, where width
is the number of features that the feature map φ gives a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import Call, UnsupportedError
from attnzoo.engines.engine import Backend, Cost, Shape, StateSizes
from attnzoo.engines.linear import fla_kernel, gradient, linear_cost
from attnzoo.engines.linear.causal import chunks
from attnzoo.engines.linear.feature_maps import FeatureMap
from attnzoo.engines.linear.native import compiled_recurrence, feature_native
from attnzoo.engines.linear.reference import REFERENCE, LinearReference
from attnzoo.engines.linear.state import LinearState, Recent, early_and_late
from attnzoo.engines.linear.sums import Past, absorb, read_all
from attnzoo.engines.piece_by_piece import join
from attnzoo.engines.tried_on_gpu import untried


class Linear(LinearReference):
    """Kernel attention through a feature map.

    Its backends in order: `fla`, flash-linear-attention on CUDA; `native`, in C++ for causal calls,
    where that has been compiled; `chunked`, with a backward pass of its own; `open`, the same in
    operators that graphs and transforms can follow; the reference.

    feature_map: φ of queries and keys, how A is normalised, and how keys fade
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
        name = self._decoder(call, backend)
        before = past = state.summed(self._after)
        if call.key_length == 1:
            if name == "native":
                ((out, past),) = feature_native.carried(self.feature_map, call, before)
            else:
                past = absorb(self.feature_map, call.k, call.v, call.key_mask, before)
                (out,) = read_all(self.feature_map, call, past)
            return out, name, state.after(call, past, Recent.of(call, before, state.recent))
        walk = {"reference": _recur, "native": feature_native.carried}.get(name, _scan)
        parts = early_and_late(call)

        def pieces() -> Iterator[Tensor]:
            nonlocal before, past
            for part in parts:
                before = past
                for found in walk(self.feature_map, part, before):
                    rows, past = found
                    yield rows

        out = join(pieces(), call.key_length, 2)
        assert past is not None
        return out, name, state.after(call, past, Recent.of(parts[-1], before))

    def _decoder(self, call: Call, backend: str) -> str:
        """The backend that carries a state on."""
        if backend == "fla":
            raise UnsupportedError("backend='fla' does not decode; use backend='auto'")
        learns = torch.is_grad_enabled()  # of a state, `native` has no backward pass
        if backend == "native" and learns:
            raise UnsupportedError(
                "backend='native' decodes without gradients: call step under torch.no_grad(), or "
                "use backend='auto'"
            )
        if backend != "auto":
            return self.choose(call, backend).name
        passed = ("fla", "native") if learns else ("fla",)
        decoders = [one for one in self.backends if one.name not in passed]
        return next(one.name for one in decoders if one.reason(self, call, by_name=False) is None)

    def _after(self, call: Call, past: Past | None) -> Past:
        """The past with the keys of a call."""
        return absorb(self.feature_map, call.k, call.v, call.key_mask, past, chunks.CAUSAL_CHUNK)

    def cost(self, shape: Shape) -> Cost:
        return linear_cost.cost(self.feature_map, shape)


def _chunked(engine: Linear, call: Call) -> Tensor:
    if _lies_inside_heads(engine.feature_map, call):
        q, k, v = (x.transpose(0, 1) for x in (call.q, call.k, call.v))
        return _chunked(engine, replace(call, q=q, k=k, v=v)).transpose(0, 1)
    return _behind_blind_rows(gradient.attend, engine, call)


def _lies_inside_heads(feature_map: FeatureMap, call: Call) -> bool:
    """Whether each head holds its samples one behind the other, as it does the pieces of a packed
    row, and samples may take the place of heads: products then need no copies."""
    alike = call.group == 1 and call.key_mask is None and not feature_map.decay.fades
    return alike and all(
        min(x.shape[:2]) > 1 and x.stride(0) < x.stride(1) for x in (call.q, call.k, call.v)
    )


def _chunked_why_not(engine: Linear, call: Call) -> str | None:
    return gradient.why_not(engine.feature_map, call)


def _native(engine: Linear, call: Call) -> Tensor:
    return _behind_blind_rows(feature_native.attend, engine, call)


def _native_skips_padding(engine: Linear, call: Call) -> bool:
    """Whether the operators make the features of all keys."""
    return call.offset <= 0 and feature_native.has_elu_inside(engine.feature_map)


def _native_why_not(engine: Linear, call: Call) -> str | None:
    return feature_native.why_not(engine.feature_map, call)


def _native_passed_over(engine: Linear, call: Call) -> str | None:
    return compiled_recurrence.passed_over(call)


def _open(engine: Linear, call: Call) -> Tensor:
    return _behind_blind_rows(gradient.attend_openly, engine, call)


def _open_why_not(engine: Linear, call: Call) -> str | None:
    if call.segments is None:
        return None
    if not call.is_causal or call.offset:
        return "its sums are of one piece at a time: it packs causal calls, of one query a key"
    if engine.feature_map.scales_keys:
        return "one piece's largest key would scale the next one's features"
    return None


def _behind_blind_rows(
    attend: Callable[[FeatureMap, Call], Tensor], engine: Linear, call: Call
) -> Tensor:
    """A·v by `attend`, which takes at most as many causal queries as keys; the queries before the
    first key see nothing, and their rows are 0."""
    # max(0, -call.offset) would stay an unknown number where a compiler has symbolic lengths.
    blind = -call.offset if call.is_causal and call.offset < 0 else 0
    if not blind:
        return attend(engine.feature_map, call)
    out = attend(engine.feature_map, call.select(queries=slice(blind, None)))
    return torch.cat([out.new_zeros(*out.shape[:2], blind, out.shape[3]), out], 2)


def _scan(
    feature_map: FeatureMap, call: Call, past: Past | None
) -> Iterator[tuple[Tensor, Past | None]]:
    """Causal attention in chunks, for a call with as many queries as keys.

    past: the sums over the tokens before the call; None when there are none

    Yields some rows at a time, (batch, heads, tokens, value_dim), and the past after them.
    """
    for piece in chunks.causal(feature_map, call, past, remember_last=True):
        yield piece.rows, piece.after


def _recur(
    feature_map: FeatureMap, call: Call, past: Past | None
) -> Iterator[tuple[Tensor, Past | None]]:
    """As `_scan`, by the plain recurrence: each token is added to the past, which its query then
    reads."""
    for token in range(call.key_length):
        here = slice(token, token + 1)
        one = call if call.key_length == 1 else call.select(queries=here, keys=here)
        past = absorb(feature_map, one.k, one.v, one.key_mask, past)
        for rows in read_all(feature_map, one, past):
            yield rows, past


Linear.backends = (
    Backend("fla", fla_kernel.run, fla_kernel.why_not, untried=untried),
    Backend(
        "native",
        _native,
        _native_why_not,
        untried=_native_passed_over,
        skips_padding=_native_skips_padding,
    ),
    Backend("chunked", _chunked, _chunked_why_not),
    Backend("open", _open, _open_why_not, packs=True),
    replace(REFERENCE, packs=True),
)
