"""The reference of gates and delta rules: A written out, quadratic in the length.

    A = P(q, k) · W,    P(x, k)_ij = Σ_c x_ic k_jc exp(log_decay summed over tokens j+1 to i)_c

for j ≤ i and hidden keys left out. W is the identity where a token adds its value. Under the delta
rule a token writes u_i = β_i (v_i - Σ_{j<i} P(k, k)_ij u_j), its value less what the state says of
its key: u = W v with W = (1 + β P(k, k) below the diagonal)⁻¹ β, one triangular solve.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call, repeat_heads
from attnzoo.engines.engine import Backend, Engine, never_refuses
from attnzoo.engines.exponential import exp_
from attnzoo.engines.linear.gated.tokens import Rule, check_gates, prepared, separated
from attnzoo.engines.softmax.reference import visible


class GatedReference(Engine):
    """Gates and delta rules without a fast backend.

    rule: what a token does to the state.
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def completed(self, call: Call) -> Call:
        return check_gates(call)

    def matrix(self, call: Call) -> Tensor:
        if call.offset < 0:  # the first queries stand before every key
            seeing = self.matrix(call.select(queries=slice(-call.offset, None)))
            return F.pad(seeing, (0, 0, -call.offset, 0))
        call = prepared(self.rule, separated(self.rule, call))
        q, k, group = call.q, repeat_heads(call.k, call.group), call.group
        gates = call.get("log_decay")
        gates = None if gates is None else repeat_heads(gates, group)
        mask = visible(call)
        assert mask is not None  # it is causal
        scores = faded_products(q, k, gates).masked_fill(~mask, 0.0)
        if not self.rule.delta:
            return scores
        overlaps = faded_products(k, k, gates).tril(-1)
        beta = call.get("beta")
        beta = k.new_ones(k.shape[:3]) if beta is None else repeat_heads(beta, group)
        writes = torch.linalg.solve_triangular(
            overlaps * beta[..., None], beta.diag_embed(), upper=False, unitriangular=True
        )
        return scores @ writes


def faded_products(x: Tensor, k: Tensor, log_decay: Tensor | None) -> Tensor:
    """P(x, k), (batch, heads, rows, keys). x: (batch, heads, rows, width), rows of the last tokens.

    k: (batch, heads, keys, width). log_decay: (batch, heads, keys), or also a width; None: none.
    Entries of keys behind a row are of no meaning.
    """
    if log_decay is None:
        return x @ k.mT
    rows = x.shape[2]
    if log_decay.dim() == 3:
        return x @ k.mT * faded(log_decay)[..., -rows:, :]
    found = 0.0
    for channel in range(k.shape[3]):  # at once they would take `width` times the memory of A
        one = slice(channel, channel + 1)
        kept = faded(log_decay[..., channel])[..., -rows:, :]
        found = found + x[..., one] * k[..., one].mT * kept
    assert isinstance(found, Tensor)
    return found


def faded(log_decay: Tensor) -> Tensor:
    """exp(Σ log_decay over tokens j+1 to i) for every i and j ≤ i, and 1 above the diagonal.

    log_decay: (..., length), -inf where everything is forgotten. Returns (..., length, length). The
    sums are of their own terms alone: differences of sums from the start would lose the digits of
    what came after a gate that closed.
    """
    length = log_decay.shape[-1]
    steps = log_decay[..., :, None].expand(*log_decay.shape, length)
    return exp_(steps.tril(-1).cumsum(-2))


def reference(engine: GatedReference, call: Call) -> Tensor:
    """A·v by A itself, in q's dtype."""
    weights = engine.matrix(call)
    return (weights @ repeat_heads(call.v, call.group).to(weights.dtype)).to(call.q.dtype)


REFERENCE = Backend("reference", reference, never_refuses, packs=True)
GatedReference.backends = (REFERENCE,)
