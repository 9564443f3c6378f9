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
from attnzoo.engines.softmax.tiles import cannot_work_alone
from attnzoo.engines.sparse.patterns.grid import Grid
from attnzoo.variants.sparse_transformer.factorized_layout import (
    Columns,
    Last,
    Near,
    Part,
    Rows,
    part_of,
    shown,
)
from attnzoo.variants.sparse_transformer.factorized_patterns import Factor

NUMBERS = 2**20  # of a call's keys, fetched or not, and of the scores that it hides one by one


@dataclass(frozen=True)
class Span:
    """Groups first..end of a factor, whose rows share keys: rows low..high of keys for the first
    group. Of Near those of the next group begin one row further on; of the others all groups have
    the same."""

    first: int
    end: int
    low: int
    high: int


@dataclass(frozen=True)
class Share:
    """A factor's part of A. near: the factor that shows some of its keys already. Groups of rows
    that share keys are rows of queries, and of Columns the columns."""

    factor: Factor
    near: Factor | None
    part: Part
    grid: Grid

    def fold(self, x: Tensor) -> Tensor:
        """(count, stride, ...) -> (groups, rows, ...), a view."""
        return x.transpose(0, 1) if isinstance(self.part, Columns) else x

    def keys(self, span: Span, x: Tensor) -> Tensor:
        """(key_rows, stride, y) -> the keys of every group, (groups, keys, y); views, but of
        Last."""
        if isinstance(self.part, Columns):
            return x.transpose(0, 1)[span.first : span.end]
        if isinstance(self.part, Last):
            return self.part.keys(x[None, None])[0].expand(span.end - span.first, -1, -1)
        step, line, number = x.stride()
        shape = (span.end - span.first, (span.high - span.low) * x.shape[1], x.shape[2])
        return x.as_strided(shape, (step, line, number), x.storage_offset() + span.low * step)

    def add(self, span: Span, gradient: Tensor, total: Tensor) -> None:
        """Add what `keys` sends back, (groups, keys, d), to (key_rows, stride, d)."""
        if isinstance(self.part, Columns):
            total.transpose(0, 1)[span.first : span.end] += gradient
        elif isinstance(self.part, Last):
            total[:, total.shape[1] - self.part.columns :] += gradient.sum(0).view(
                total.shape[0], self.part.columns, -1
            )
        else:
            for place, share in enumerate(gradient.split(total.shape[1], 1)):
                total.narrow(0, span.low + place, len(share)).add_(share)

    def spans(self, head_dim: int, is_padded: bool) -> Iterator[Span]:
        """Spans of groups that hide the same keys, where no padding hides more, of `NUMBERS`
        numbers each."""
        rows, part = self.part.rows, self.part
        if isinstance(part, Near):
            yield from self._near_spans(
                part, _together(part.width, rows.stride if is_padded else head_dim, head_dim)
            )
            return
        groups, size = (
            (rows.stride, rows.count)
            if isinstance(part, Columns)
            else (rows.count, 1 if self._alike else rows.stride)
        )
        together = _together(part.width, size, head_dim)
        ragged = (
            groups - rows.spare if isinstance(part, Columns) else groups
        )  # columns from here on lack their last key
        for start, stop in ((0, ragged), (ragged, groups)):
            for first in range(start, stop, together):
                yield Span(first, min(first + together, stop), 0, rows.key_rows)

    def _near_spans(self, part: Near, together: int) -> Iterator[Span]:
        """The rows at the ends, whose keys are fewer or partly missing, one by one."""
        rows, inner = part.rows, []
        for row in range(rows.count):
            low, high = rows.first + row - part.before, rows.first + row + part.after + 1
            missing = low < 0 or high > rows.key_rows or (high == rows.key_rows and rows.spare > 0)
            if not missing and inner and len(inner) < together:
                inner.append(row)
                continue
            if inner:
                yield self._inner_span(part, inner)
            inner = [] if missing else [row]
            if missing and max(0, low) < min(rows.key_rows, high):
                yield Span(row, row + 1, max(0, low), min(rows.key_rows, high))
        if inner:
            yield self._inner_span(part, inner)

    @staticmethod
    def _inner_span(part: Near, inner: list[int]) -> Span:
        """Consecutive rows of which each has all its keys."""
        first = part.rows.first + inner[0]
        return Span(inner[0], inner[-1] + 1, first - part.before, first + part.after + 1)

    def sizes(self, span: Span) -> tuple[int, int, int]:
        """Groups, rows of each, and keys of each."""
        rows = self.part.rows
        keys = (
            (span.high - span.low) * rows.stride if isinstance(self.part, Near) else self.part.width
        )
        return (
            span.end - span.first,
            rows.count if isinstance(self.part, Columns) else rows.stride,
            keys,
        )

    @property
    def _alike(self) -> bool:
        """Whether Last hides the same from every row of a group."""
        return self.near is not None or not self.grid.is_causal

    def seen(self, span: Span) -> Tensor:
        """Which keys the rows of a span see, padding left out: (groups or 1, rows or 1, keys)
        bool."""
        rows, part = self.part.rows, self.part
        queries = torch.arange(
            rows.first * rows.stride, (rows.first + rows.count) * rows.stride
        ).view(rows.count, rows.stride)
        keys = torch.arange(rows.key_rows * rows.stride).view(rows.key_rows, rows.stride)
        some = self.fold(queries)[span.first : span.end, :, None]
        if isinstance(part, Last):
            return shown(
                self.factor,
                self.near,
                self.grid,
                some[:, :1] if self._alike else some,
                part.positions(keys.device),
            )
        its_keys = self.keys(span, keys[..., None])[:1].mT
        return shown(self.factor, self.near, self.grid, some[:1], its_keys)


def _together(keys: int, rows: int, head_dim: int) -> int:
    return max(1, NUMBERS // (keys * max(rows, head_dim)))


Heads = Sequence[tuple[Sequence[Share], Sequence[int]]]  # what heads see, and these heads


def why_not(engine: SoftmaxReference, call: Call) -> str | None:
    """Why torch's flash kernel does not take the call; None when it does."""
    if call.v.shape[3] != call.q.shape[3]:
        return f"the kernel wants value_dim={call.v.shape[3]} to be head_dim={call.q.shape[3]}"
    return cannot_work_alone(engine, call)


def shares_of(factors: tuple[Factor, ...], rows: Rows, grid: Grid) -> list[Share]:
    """What heads see that see these factors together; without the second where it adds nothing."""
    near = factors[0]
    some = [one for one in factors if one is near or one.adds(grid)]
    return [
        Share(one, None if one is near else near, part_of(one, rows, grid.is_causal), grid)
        for one in some
    ]


def attend(
    engine: SoftmaxReference,
    groups: Sequence[tuple[tuple[Factor, ...], list[int]]],
    call: Call,
    grid: Grid,
    compute: Compute,
) -> Tensor:
    """A·v. groups: factors that heads see together, and these heads. compute: the same of q, k and
    v, wherever this does not serve."""
    rows = Rows.of(groups[0][0][0].stride, grid)
    heads = [(shares_of(factors, rows, grid), own) for factors, own in groups]
    out, _ = _Attend.apply(
        call.q, call.k, call.v, call.key_mask, rows, heads, engine.scale_of(call.q), compute
    )
    return out


class _Attend(torch.autograd.Function):
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
        log_sums.masked_fill_(
            log_sums == -torch.inf, 0.0
        )  # of a row that sees nothing: any finite number
        return rows.taken(out).to(
            q.dtype, memory_format=torch.contiguous_format
        ).contiguous(), log_sums

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, key_mask, ctx.rows, ctx.heads, ctx.scale, ctx.compute = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(q, k, v, key_mask, *output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, key_mask, out, log_sums = ctx.saved_tensors
        if is_followed(gradients[0]):
            return (
                *open_gradients(ctx.compute, (q, k, v), gradients[0]),
                None,
                None,
                None,
                None,
                None,
            )
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
    """q: (batch, heads, count, stride, d), k, v: (batch, kv_heads, key_rows, stride, d), in the
    precision of sums; visible: (batch, key_rows, stride, 1) bool, None without a key_mask."""

    rows: Rows
    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor | None

    @classmethod
    def of(cls, rows: Rows, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> _Laid:
        dtype = accumulation_dtype(q.dtype)
        visible = None if key_mask is None else rows.keys(key_mask[:, None, :, None])[:, 0]
        return cls(
            rows, rows.queries(q.to(dtype)), rows.keys(k.to(dtype)), rows.keys(v.to(dtype)), visible
        )

    def calls(
        self, heads: Heads
    ) -> Iterator[tuple[Share, Span, Tensor | None, tuple[int, int], tuple[int, int]]]:
        """Every share and span with what hides its keys, to be added to scores, (1, groups or 1,
        rows or 1, keys), for every (sample, head) and (sample, kv_head)."""
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
        """0 where a key is seen, -inf where not; None where all are."""
        seen = share.seen(span)
        if self.visible is not None:
            seen = seen & share.keys(span, self.visible[sample]).mT
        return (
            None
            if seen.all()
            else self.q.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)[None]
        )


def _join(out: Tensor, log_sums: Tensor, rows: Tensor, more: Tensor) -> None:
    """Add rows over other keys, with their log-sums, to those so far, in place."""
    total = torch.logaddexp(log_sums, more)
    finite = total.masked_fill(total == -torch.inf, 0.0)
    out.mul_((log_sums - finite).exp_()[..., None]).addcmul_(
        rows, (more - finite).exp_()[..., None]
    )
    log_sums.copy_(total)
