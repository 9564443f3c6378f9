"""Log-linear attention: the engine of gates with a Fenwick tree of states in the place of one.

A = A of the gates and the delta rule ∘ levels, by how many bits the places of two tokens differ
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from attnzoo.autocast import without_autocast
from attnzoo.call import Call
from attnzoo.eager import can_look, is_recorded
from attnzoo.engines.engine import Backend, Cost, Shape, accumulation_dtype, never_refuses
from attnzoo.engines.linear.gated.gated_linear import GatedLinear
from attnzoo.engines.linear.gated.reference import REFERENCE
from attnzoo.engines.linear.gated.tokens import STRENGTH, as_square
from attnzoo.engines.linear.log_linear import tree_cost, tree_fla
from attnzoo.engines.linear.log_linear.tree import (
    LEVELS,
    given_levels,
    level_between,
    levels_of,
    positions,
)
from attnzoo.engines.linear.log_linear.tree_chunks import attend
from attnzoo.engines.linear.log_linear.tree_state import Tree, in_chunks, no_tokens, one_by_one
from attnzoo.engines.linear.native import compiled_recurrence, tree_native
from attnzoo.engines.linear.state import LinearState
from attnzoo.engines.linear.sums import Past
from attnzoo.engines.tried_on_gpu import never_ran
from attnzoo.sequences.ordering import true_first
from attnzoo.sequences.padding import fetched


class LogLinear(GatedLinear):
    """Gates and delta rules over a Fenwick tree, causal only.

    Its backends in order: `fla`, flash-linear-attention on CUDA, asked for by name; `native_row`,
    one token in C++, where that has been compiled; `open`, in chunks; the reference. A row on
    padding is 0: it has no place among the tokens.

    rule: what a token does to every bucket
    """

    def completed(self, call: Call) -> Call:
        call = _checked_levels(super().completed(call))
        beta = call.get(STRENGTH.name)
        if beta is None or self.rule.delta:
            return call
        # Where a token adds its value, its strength is a factor of its key.
        inputs = {name: x for name, x in call.inputs.items() if name != STRENGTH.name}
        k = call.k * beta.to(accumulation_dtype(call.k.dtype))[..., None]
        return replace(call, k=k, inputs=inputs)

    def forward(
        self, call: Call, backend: str = "auto", state: LinearState | None = None
    ) -> tuple[Tensor, str, Any]:
        seen = 0 if state is None else state.seen
        given_levels(call, seen + call.key_length)  # refuses too few
        return super().forward(call, backend, state)

    def matrix(self, call: Call) -> Tensor:
        return as_square(self._weighted, call)

    def _weighted(self, call: Call) -> Tensor:
        """A of a call with as many queries as keys."""
        count = levels_of(call.key_length)
        levels = given_levels(call, call.key_length)
        index = level_between(positions(call), count)[:, None]
        a = self._square(call)
        return a * levels.to(a.dtype).gather(-1, index.expand(*a.shape))

    def _walk(self, call: Call, past: Past | None, backend: str) -> Iterator[tuple[Tensor, Past]]:
        tree = no_tokens(call) if past is None else past
        assert isinstance(tree, Tree)
        call = call.giving(LEVELS, given_levels(call, tree.slots + call.key_length))
        if backend == "native_row":
            return iter([tree_native.step(self.rule, call, tree)])
        plain = backend == "reference" or call.key_length == 1
        return (one_by_one if plain else in_chunks)(self.rule, call, tree)

    def cost(self, shape: Shape) -> Cost:
        return tree_cost.cost(self.rule, shape)


def _checked_levels(call: Call) -> Call:
    levels = call.get(LEVELS.name)
    if levels is not None and levels.numel() and can_look(levels) and levels.amin().item() < 0:
        raise ValueError(
            f"levels has the value {levels.min().item():.6g}, below 0: it says by how much a row "
            "weighs a part of its past, so take F.softplus(x)"
        )
    return call


def _open(engine: LogLinear, call: Call) -> Tensor:
    if is_recorded():
        return as_square(lambda one: _in_order(engine, one), call)
    with without_autocast(call.q.device):
        return as_square(lambda one: _in_order(engine, one), call)


def _in_order(engine: LogLinear, call: Call) -> Tensor:
    """Rows of a call with as many queries as keys: real tokens are brought together, in order, so
    that places count these alone, and their rows back to where they stood."""
    mask, dtype = call.key_mask, call.q.dtype
    call = call.giving(LEVELS, given_levels(call, call.key_length))
    if mask is None or (can_look(mask) and bool(mask.all())):
        return attend(engine.rule, replace(call, key_mask=None)).to(dtype)
    order = true_first(mask, call.key_length)
    ordered = call.mapped(dict.fromkeys(("queries", "keys"), lambda x, dim: fetched(x, order, dim)))
    ordered = replace(ordered, key_mask=None)
    rows = attend(engine.rule, ordered).to(dtype)
    return fetched(rows, positions(call)).masked_fill(~mask[:, None, :, None], 0.0)


def _one_token(engine: LogLinear, call: Call) -> Tensor:
    call = call.giving(LEVELS, given_levels(call, 1))
    return tree_native.step(engine.rule, call, no_tokens(call))[0].to(call.q.dtype)


LogLinear.backends = (
    Backend("fla", tree_fla.run, tree_fla.why_not, untried=never_ran),
    Backend(
        "native_row",
        _one_token,
        lambda engine, call: tree_native.why_not(call),
        untried=lambda engine, call: compiled_recurrence.passed_over(call),
    ),
    Backend("open", _open, never_refuses),
    REFERENCE,
)
