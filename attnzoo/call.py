"""One request for attention: its tensors, how they are sliced, and the two rules that keep bad
slots from spreading."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor

from attnzoo.spec import Input

QUERIES = ("batch", "heads", "queries", "width")
KEYS = ("batch", "kv_heads", "keys", "width")
MASK = ("batch", "heads", "queries", "keys")
ALL = slice(None)
#: What chooses along an axis: a slice, numbers, or a tensor of numbers.
Index = slice | Sequence[int] | Tensor
#: What changes a tensor along the dimension given, and keeps the number of dimensions.
Along = Callable[[Tensor, int], Tensor]


class UnsupportedError(ValueError):
    """A variant or backend was asked for something that its `Spec` or its `why_not` excludes."""


@dataclass(frozen=True)
class Call:
    """What an engine is asked to do: compute `A(q, k, inputs) · v` under the given masks.

    q: (batch, heads, query_length, head_dim)
    k: (batch, kv_heads, key_length, head_dim)
    v: (batch, kv_heads, key_length, value_dim)
    key_mask: (batch, key_length) bool, True = attend
    attn_mask: bool (True = attend) or additive float, broadcastable to (batch, heads, query_length,
        key_length)
    is_causal: query i sees keys up to its position, key_length - query_length + i
    inputs: what else the variant takes, by name
    declared: the declarations of all inputs that the variant takes, also of those not in `inputs`
    segments: (batch, key_length) integer ids: a query sees only keys of the id at its own position
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    is_causal: bool = False
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    declared: tuple[Input, ...] = ()
    segments: Tensor | None = None

    @property
    def query_length(self) -> int:
        return self.q.shape[2]

    @property
    def key_length(self) -> int:
        return self.k.shape[2]

    @property
    def offset(self) -> int:
        """Position of the first query: the last one stands at the last key. Negative when there
        are more queries than keys."""
        return self.key_length - self.query_length

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.q.shape[1] // self.k.shape[1]

    def get(self, name: str) -> Tensor | None:
        """The input of this name; None if the call does not have it."""
        return self.inputs.get(name)

    def given(self) -> Iterator[tuple[Input, Tensor]]:
        """The inputs that the call has, each after its declaration."""
        for one in self.declared:
            if one.name in self.inputs:
                yield one, self.inputs[one.name]

    def giving(self, one: Input, x: Tensor) -> Self:
        """The call with x as the input that `one` declares, in place of any it had."""
        declared = self.declared if one in self.declared else (*self.declared, one)
        changed = {"inputs": {**self.inputs, one.name: x}, "declared": declared}
        return type(self)(**{**vars(self), **changed})

    def frame(self) -> Callable[..., Self]:
        """A function of q, k and v that makes this call with others; it does not keep its own."""
        rest = {name: x for name, x in vars(self).items() if name not in ("q", "k", "v")}
        return partial(type(self), **rest)

    def over(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Self:
        """The same request for other tokens. What belongs to the call's own tokens is left out:
        attn_mask, segments, and inputs along the length."""
        inputs = self.inputs and {one.name: x for one, x in self.given() if not one.has_length}
        changed = {"q": q, "k": k, "v": v, "key_mask": key_mask}
        changed |= {"attn_mask": None, "segments": None}
        # This does what `replace` does in half the time, which shows in a step of decoding.
        return type(self)(**{**vars(self), **changed, "inputs": inputs})

    def select(
        self,
        *,
        batch: Index | None = None,
        heads: Index | None = None,
        queries: Index | None = None,
        keys: Index | None = None,
    ) -> Self:
        """The call of some samples, heads, queries and keys; every tensor is sliced along its axes.

        heads: query heads. Their key-value heads come along, each once if all of them are shared by
            equally many of these heads, else one for every head
        """
        chosen = {"batch": batch, "heads": heads, "queries": queries, "keys": keys}
        if heads is not None:
            chosen["kv_heads"] = _kv_index(heads, self.q.shape[1], self.group)
        device = self.q.device
        given = {
            axis: index if isinstance(index, slice) else torch.as_tensor(index, device=device)
            for axis, index in chosen.items()
            if index is not None
        }
        return self.of_each(partial(_chosen, given=given))

    def mapped(self, along: Mapping[str, Along]) -> Self:
        """The call with every tensor changed by the function of each axis that it has."""

        def of(x: Tensor, axes: tuple[str, ...]) -> Tensor:
            for dim, axis in enumerate(axes):
                if axis in along:
                    x = along[axis](x, dim)
            return x

        return self.of_each(of)

    def of_each(self, of: Callable[[Tensor, tuple[str, ...]], Tensor]) -> Self:
        """The call whose tensors are what `of` makes of each tensor and the names of its axes."""
        return replace(
            self,
            **{name: of(x, axes) for name, x, axes in self._masks()},
            q=of(self.q, QUERIES),
            k=of(self.k, KEYS),
            v=of(self.v, KEYS),
            inputs={one.name: of(x, one.names) for one, x in self.given()},
        )

    def _masks(self) -> Iterator[tuple[str, Tensor, tuple[str, ...]]]:
        """key_mask, attn_mask and segments, where the call has them, with the names of their
        axes."""
        for name in ("key_mask", "segments"):
            if (x := getattr(self, name)) is not None:
                yield name, x, ("batch", "keys")
        if self.attn_mask is not None:
            yield "attn_mask", self.attn_mask, _mask_axes(self.attn_mask)

    def split(
        self,
        *,
        batch: Sequence[int] | None = None,
        queries: Sequence[int] | None = None,
        keys: Sequence[int] | None = None,
    ) -> list[Self]:
        """Consecutive calls with the given numbers of samples, queries and keys. If q and k are one
        tensor, they stay one. `select` would be slower to train: the gradient of each slice is a
        tensor as long as the whole."""
        cuts = {"batch": batch, "queries": queries, "keys": keys}
        lengths = {axis: list(one) for axis, one in cuts.items() if one is not None}
        count = len(next(iter(lengths.values())))

        def parts(x: Tensor, axes: tuple[str, ...]) -> list[Tensor]:
            cut = [dim for dim, axis in enumerate(axes) if axis in lengths]
            if not cut:
                return [x] * count
            first, *others = cut
            found = list(x.split(lengths[axes[first]], first))
            for dim in others:
                found = [one.split(lengths[axes[dim]], dim)[i] for i, one in enumerate(found)]
            return found

        q = parts(self.q, QUERIES)
        k = q if self.k is self.q and queries == keys else parts(self.k, KEYS)
        v = parts(self.v, KEYS)
        masks = {name: parts(x, axes) for name, x, axes in self._masks()}
        inputs = {one.name: parts(x, one.names) for one, x in self.given()}
        return [
            replace(
                self,
                q=q[i],
                k=k[i],
                v=v[i],
                **{name: x[i] for name, x in masks.items()},
                inputs={name: x[i] for name, x in inputs.items()},
            )
            for i in range(count)
        ]


def kv_heads_of(heads: Sequence[int], group: int) -> list[int]:
    """Key-value heads for these query heads: each once if all are shared by equally many of them
    in order, else one for every query head."""
    wanted = [head // group for head in heads]
    distinct = sorted(set(wanted))
    once = [one for one in distinct for _ in range(len(heads) // len(distinct))]
    return distinct if wanted == once else wanted


def _kv_index(heads: Index, all_heads: int, group: int) -> Index:
    """What chooses the key-value heads of these query heads."""
    if group == 1:
        return heads
    if isinstance(heads, slice):
        first, end, step = heads.indices(all_heads)
        if step == 1 and first % group == 0 and end % group == 0:
            return slice(first // group, end // group)
        return kv_heads_of(range(first, end, step), group)
    return kv_heads_of(heads.tolist() if isinstance(heads, Tensor) else heads, group)


def _chosen(x: Tensor, axes: tuple[str, ...], *, given: Mapping[str, slice | Tensor]) -> Tensor:
    slices = []
    for dim, axis in enumerate(axes):
        index = given.get(axis)
        if isinstance(index, slice):
            slices += [ALL] * (dim - len(slices)) + [index]
        elif index is not None:
            x = x.index_select(dim, index)
    return x[tuple(slices)] if slices else x


def _mask_axes(mask: Tensor) -> tuple[str, ...]:
    """Names of the axes of an attn_mask; an axis of size 1, which is broadcast, has the name ""."""
    axes = MASK[len(MASK) - mask.dim() :]
    return tuple("" if size == 1 else axis for axis, size in zip(axes, mask.shape, strict=True))


def repeat_heads(x: Tensor, group: int) -> Tensor:
    """Give every query head its own copy of the key-value head that its group shares: (batch,
    kv_heads, ...) -> (batch, kv_heads · group, ...)."""
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def spread_keys(call: Call) -> Call:
    """The call, not yet checked, with every key head repeated for the value heads that share it.
    Where v is k itself, which stands for it in `weights`, the inputs tell how many these are."""
    k, v, alike = call.k, call.v, call.v is call.k
    if not all(isinstance(x, Tensor) and x.dim() == 4 for x in (k, v)) or k.shape[1] == 0:
        return call
    wanted = v.shape[1]
    for one, x in call.given() if alike else ():
        if "kv_heads" in one.names and isinstance(x, Tensor) and x.dim() == len(one.names):
            wanted = x.shape[one.names.index("kv_heads")]
    if wanted <= k.shape[1] or wanted % k.shape[1]:
        return call
    k = repeat_heads(k, wanted // k.shape[1])
    return replace(call, k=k, v=k if alike else v)
