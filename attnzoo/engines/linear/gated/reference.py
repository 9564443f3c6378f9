"""The reference of gates and delta rules: A written out, quadratic in the length.

    A = P(q, k) · W,    P(x, k)_ij = Σ_c x_ic k_jc exp(log_decay summed over tokens j+1 to i)_c

for j ≤ i. W is the identity where a token adds its value. By the delta rule a token writes
u_i = β_i (v_i - Σ_{j<i} P(k, k)_ij u_j), its value less what the state says of its key: u = W v,
W = (1 + β P(k, k) below the diagonal)⁻¹ β, by one triangular solve. What is removed at keys c is
again by one solve, with P⁻, in which the row's own gate does not count: u = P⁻(c, k) v less
P⁻(c, r ∘ c) u, and A = P(q, k) - P(q, r ∘ c) U where u = U v. Every backend must equal it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnzoo.call import Call, repeat_heads
from attnzoo.engines.engine import Backend, Engine, never_refuses
from attnzoo.engines.linear.gated.channel_fading import ChannelFading, fading_of
from attnzoo.engines.linear.gated.tokens import (
    Rule,
    as_square,
    check_gates,
    constant_gates,
    prepared,
    separated,
)
from attnzoo.engines.softmax.reference import visible


class GatedReference(Engine):
    """Gates and delta rules without a fast backend.

    rule: what a token does to the state.
    slopes: by how much the state of every head fades at each token, where that is constant.
    """

    def __init__(self, rule: Rule, slopes: tuple[float, ...] | None = None) -> None:
        super().__init__()
        self.rule = rule
        self.slopes = slopes

    def check_inputs(self, call: Call) -> None:
        check_gates(call)

    def completed(self, call: Call) -> Call:
        return call if self.slopes is None else constant_gates(self.slopes, call)

    def matrix(self, call: Call) -> Tensor:
        return as_square(self._square, call)

    def _square(self, call: Call) -> Tensor:
        """A of a call with as many queries as keys."""
        mask, group = visible(call), call.group
        call = prepared(self.rule, separated(self.rule, call))
        q, k = call.q, repeat_heads(call.k, group)
        gates, beta = (
            None if x is None else repeat_heads(x, group)
            for x in (call.get("log_decay"), call.get("beta"))
        )
        if mask is None:  # one token
            mask = torch.ones(1, 1, dtype=torch.bool, device=q.device)
        if self.rule.removes:
            # What is written and what is removed again may be large beside what is left.
            removed, rates = (
                repeat_heads(call.inputs[name], group).double()
                for name in ("removal_key", "removal_rate")
            )
            dtype, q, k = k.dtype, q.double(), k.double()
            gates = None if gates is None else gates.double()
            turned = removed * rates
            below, written = (products(removed, x, gates, own=False).tril(-1) for x in (turned, k))
            taken = torch.linalg.solve_triangular(below, written, upper=False, unitriangular=True)
            left = products(q, k, gates) - products(q, turned, gates) @ taken
            return left.to(dtype).masked_fill(~mask, 0.0)
        scores = products(q, k, gates)
        if not self.rule.delta:
            return scores.masked_fill(~mask, 0.0)
        overlaps = products(k, k, gates).tril(-1)
        beta = k.new_ones(k.shape[:3]) if beta is None else beta
        writes = torch.linalg.solve_triangular(
            overlaps * beta[..., None], beta.diag_embed(), upper=False, unitriangular=True
        )
        if self.rule.l2_norm:
            return (scores @ writes).masked_fill(~mask, 0.0)
        # A write that overflows must not reach earlier rows, whose scores of it are 0.
        reached = (~writes.isfinite().all(-1, keepdim=True)).cumsum(-2) > 0
        left = (scores @ writes.nan_to_num()).masked_fill(reached, math.nan)
        return left.masked_fill(~mask, 0.0)


def products(x: Tensor, k: Tensor, log_decay: Tensor | None, *, own: bool = True) -> Tensor:
    """P(x, k), (batch, heads, length, length), 0 above the diagonal: that of one chunk of all
    tokens. own: whether the gate of the row's own token counts; else the diagonal has no meaning.
    """
    fading = fading_of(log_decay, k)
    if not own:
        assert isinstance(fading, ChannelFading)
        fading = fading.before_own()
    return fading.faded([x[:, :, None]], k).products[0][:, :, 0]


def reference(engine: GatedReference, call: Call) -> Tensor:
    """A·v by A itself, in q's dtype."""
    weights = engine.matrix(call)
    return (weights @ repeat_heads(call.v, call.group).to(weights.dtype)).to(call.q.dtype)


REFERENCE = Backend("reference", reference, never_refuses, packs=True)
GatedReference.backends = (REFERENCE,)
