"""Factorized attention on the CPU: every factor of a head is calls of torch's flash attention,
joined by the log-sums of their rows.

With s the scores of a row, L_f = log Σ exp(s) over the keys of factor f and L over those of all, A
= Σ_f exp(L_f - L) A_f, since no key is in two factors. The kernel's backward pass, given L and the
joined output, is that of the factor's part of A. Nothing as wide as a row's keys is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.differentiable import Compute, is_followed, open_gradients
from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.softmax.reference import SoftmaxReference
from attnzoo.engines.softmax.tiles.tiles import cannot_work_alone
from attnzoo.engines.sparse.patterns.grid import Grid
from attnzoo.variants.sparse_transformer.factorized_layout import (
    Rows,
)
from attnzoo.variants.sparse_transformer.factorized_patterns import Factor
from attnzoo.variants.sparse_transformer.factorized_shares import Share, Span, shares_of

Heads = Sequence[tuple[Sequence[Share], Sequence[int]]]  # what heads see, and these heads


def why_not(engine: SoftmaxReference, call: Call) -> str | None:
    """Why torch's flash kernel does not take the call; None when it does."""
    if call.v.shape[3] != call.q.shape[3]:
        return f"the kernel wants value_dim={call.v.shape[3]} to be head_dim={call.q.shape[3]}"
    return cannot_work_alone(engine, call)


def attend(
    engine: SoftmaxReference,
    groups: Sequence[tuple[tuple[Factor, ...], list[int]]],
    call: Call,
    grid: Grid,
    compute: Compute,
) -> Tensor:
    """A·v, (batch, heads, query_length, value_dim).

    groups: factors that heads see together, and these heads
    compute: the same of q, k and v in operators that autograd can follow, for further derivatives
    """
    rows = Rows.of(groups[0][0][0].stride, grid)
    heads = [(shares_of(factors, rows, grid), own) for factors, own in groups]
    out, _ = _Attend.apply(
        call.q, call.k, call.v, call.key_mask, rows, heads, engine.scale_of(call.q), compute
    )
    return out


class _Attend(torch.autograd.Function):
    """`attend`: its output, and the log-sums of all rows, which its backward pass reads."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        rows: Rows,
        heads: Heads,
        scale: float,
        compute: Compute,
    ) -> tuple[Tensor, Tensor]:
        laid = _Laid.of(rows, q, k, v, key_mask)
        out = torch.zeros_like(laid.q)
        log_sums = out.new_full(out.shape[:-1], -torch.inf)
        for share, span, bias, one, kv in laid.calls(heads):
            here = slice(span.first, span.end)
            places, sums = (share.fold(x[one])[here] for x in (out, log_sums))
            keys, values = (share.keys(span, x[kv])[None] for x in (laid.k, laid.v))
            found, more = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                share.fold(laid.q[one])[None, here], keys, values, attn_mask=bias, scale=scale
            )
            if bias is not None:  # the kernel gives 0 for a row that sees nothing
                more = more.masked_fill(bias.amax(-1) == -torch.inf, -torch.inf)
            _join(places, sums, found[0], more[0])
            del found, more, keys, values  # before the next ones stand
        # Of a row that sees nothing any finite number serves.
        log_sums.masked_fill_(log_sums == -torch.inf, 0.0)
        found = rows.taken(out).to(q.dtype, memory_format=torch.contiguous_format)
        return found.contiguous(), log_sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, key_mask, ctx.rows, ctx.heads, ctx.scale, ctx.compute = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(q, k, v, key_mask, *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, key_mask, out, log_sums = ctx.saved_tensors
        if is_followed(gradients[0]):
            return *open_gradients(ctx.compute, (q, k, v), gradients[0]), *[None] * 5
        laid = _Laid.of(ctx.rows, q, k, v, key_mask)
        sent, out = (laid.rows.queries(x.to(laid.q.dtype)) for x in (gradients[0], out))
        d_q, d_k, d_v = (torch.zeros_like(x) for x in (laid.q, laid.k, laid.v))
        for share, span, bias, one, kv in laid.calls(ctx.heads):
            here = slice(span.first, span.end)
            d_rows, queries, found, sums = (
                share.fold(x[one])[None, here] for x in (sent, laid.q, out, log_sums)
            )
            keys, values = (share.keys(span, x[kv])[None] for x in (laid.k, laid.v))
            to_q, to_k, to_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                d_rows,
                queries,
                keys,
                values,
                found,
                sums,
                0.0,
                False,
                attn_mask=bias,
                scale=ctx.scale,
            )
            share.fold(d_q[one])[here] += to_q[0]
            share.add(span, to_k[0], d_k[kv])
            share.add(span, to_v[0], d_v[kv])
            del to_q, to_k, to_v, keys, values
        d_keys = (x.flatten(2, 3)[:, :, : k.shape[2]].to(k.dtype) for x in (d_k, d_v))
        return laid.rows.taken(d_q).to(q.dtype), *d_keys, None, None, None, None, None


@dataclass(frozen=True)
class _Laid:
    """A call laid out in rows of `stride`, in the precision of sums.

    q: (batch, heads, count, stride, d)
    k, v: (batch, kv_heads, key_rows, stride, d)
    visible: (batch, key_rows, stride, 1) bool; None without a key_mask
    """

    rows: Rows
    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor | None

    @classmethod
    def of(cls, rows: Rows, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> _Laid:
        dtype = accumulation_dtype(q.dtype)
        visible = None if key_mask is None else rows.keys(key_mask[:, None, :, None])[:, 0]
        q, k, v = (_readable(x, dtype) for x in (q, k, v))
        return cls(rows, rows.queries(q), rows.keys(k), rows.keys(v), visible)

    def calls(
        self, heads: Heads
    ) -> Iterator[tuple[Share, Span, Tensor | None, tuple[int, int], tuple[int, int]]]:
        """The calls of the kernel: a share, a span of it, what hides its keys (`_bias`), (sample,
        head) and (sample, kv_head)."""
        group, head_dim = self.q.shape[1] // self.k.shape[1], self.q.shape[4]
        for sample in range(self.q.shape[0]):
            for shares, own in heads:
                for share in shares:
                    for span in share.spans(head_dim, self.visible is not None):
                        bias = self._bias(share, span, sample)
                        if (
                            self.visible is not None
                            and bias is not None
                            and bias.amax() == -torch.inf
                        ):
                            continue
                        for head in own:
                            yield share, span, bias, (sample, head), (sample, head // group)

    def _bias(self, share: Share, span: Span, sample: int) -> Tensor | None:
        """What is added to scores, (1, groups or 1, rows or 1, keys): 0 where a key is seen, -inf
        where not; None where all are."""
        seen = share.seen(span)
        if self.visible is not None:
            seen = seen & share.keys(span, self.visible[sample]).mT
        return (
            None
            if seen.all()
            else self.q.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)[None]
        )


def _readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in this dtype, with a row's numbers side by side, as the kernel takes for granted."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _join(out: Tensor, log_sums: Tensor, rows: Tensor, more: Tensor) -> None:
    """Add rows over other keys to those so far, in place.

    out, rows: (groups, rows, d)
    log_sums, more: (groups, rows), of `out` and of `rows`
    """
    total = torch.logaddexp(log_sums, more)
    finite = total.masked_fill(total == -torch.inf, 0.0)
    out.mul_((log_sums - finite).exp_()[..., None]).addcmul_(
        rows, (more - finite).exp_()[..., None]
    )
    log_sums.copy_(total)
