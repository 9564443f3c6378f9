"""One call that a rule is tried on: its sizes, and the tensors that a seed makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.spec import Input, Spec

PADDINGS = ("none", "left", "right", "inside", "all")
OPEN, MANY = 3.0, 60  # what opens gates of calls of more tokens than that


@dataclass(frozen=True)
class Trial:
    """The sizes of a call.

    query_length, key_length: in tokens
    batch_size, heads, kv_heads, head_dim: of q, k and v
    is_causal: whether a query sees what comes after it
    padding: where samples are padded, one of `PADDINGS`; all: the first sample, whole
    pieces: texts in a packed row
    dtype: of the tensors
    seed: draws them
    """

    query_length: int = 9
    key_length: int = 9
    batch_size: int = 2
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 8
    is_causal: bool = False
    padding: str = "none"
    pieces: int = 1
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def __str__(self) -> str:
        lengths = "1 token" if self.key_length == 1 else f"{self.key_length} tokens"
        if self.query_length != self.key_length:
            queries = "1 query" if self.query_length == 1 else f"{self.query_length} queries"
            keys = "1 key" if self.key_length == 1 else f"{self.key_length} keys"
            lengths = f"{queries} and {keys}"
        heads = "1 head" if self.heads == 1 else f"{self.heads} heads"
        if self.kv_heads != self.heads:
            heads += f" over {self.kv_heads}"
        parts = [f"{self.batch_size} x {lengths}", f"{heads} of {self.head_dim}"]
        parts += ["causal"] if self.is_causal else []
        parts += [f"padding {self.padding}"] if self.padding != "none" else []
        parts += [f"{self.pieces} packed pieces"] if self.pieces > 1 else []
        return f"{', '.join(parts)}, {str(self.dtype)[6:]}, seed {self.seed}"

    def smaller(self) -> list[Trial]:
        """The same with one thing less, in the order in which they are worth trying."""
        found = []
        if self.batch_size > 1 and self.padding != "all":
            found += [replace(self, batch_size=size) for size in (1, self.batch_size - 1)]
        if self.heads > 1:
            found.append(replace(self, heads=1, kv_heads=1))
            group = self.heads // self.kv_heads
            if group > 1:
                found.append(replace(self, heads=group, kv_heads=1))
        gone = self.key_length - self.query_length
        for less in (self.key_length // 2, self.key_length // 4, 8, 1):
            length = self.key_length - less
            if length >= max(1, gone + 1, self.pieces):
                found.append(replace(self, key_length=length, query_length=length - gone))
        if gone > 1:
            found.append(replace(self, key_length=self.query_length + 1))
        if gone < -1:
            found.append(replace(self, query_length=self.key_length + 1))
        if self.pieces > 2:
            found.append(replace(self, pieces=2))
        found += [replace(self, head_dim=d) for d in (1, 2) if d < self.head_dim]
        return [one for one in found if one != self]


@dataclass(frozen=True)
class Given:
    """The tensors of a call, in this library's layout.

    q: (batch, heads, query_length, head_dim)
    k, v: (batch, kv_heads, key_length, head_dim)
    is_causal: whether query i sees keys up to position key_length - query_length + i alone
    key_mask: (batch, key_length) bool, True = a token; None: all are
    segments: (batch, key_length) int, the piece that each token belongs to; None: one
    inputs: what else the variant takes, by name; their axes are in `axes`
    """

    q: Tensor
    k: Tensor
    v: Tensor
    is_causal: bool
    key_mask: Tensor | None = None
    segments: Tensor | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    axes: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, trial: Trial, spec: Spec | None) -> Given:
        """spec: of the variant whose inputs are drawn as well; None: there are none."""
        generator = torch.Generator().manual_seed(trial.seed)
        sizes = {
            "batch": trial.batch_size,
            "heads": trial.heads,
            "kv_heads": trial.kv_heads,
            "queries": trial.query_length,
            "keys": trial.key_length,
            "width": trial.head_dim,
            "value_width": trial.head_dim,
            "levels": trial.key_length.bit_length() + 1,
        }

        def draw(*names: str) -> Tensor:
            shape = [sizes[name] for name in names]
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(trial.dtype)

        q = draw("batch", "heads", "queries", "width")
        k = draw("batch", "kv_heads", "keys", "width")
        v = draw("batch", "kv_heads", "keys", "value_width")
        drawn = [one for one in spec.inputs if is_drawn(one)] if spec is not None else []
        if any(one.name == "beta" for one in drawn):
            k = F.normalize(k, dim=-1)  # by longer keys a delta rule grows without bound
        # Sums of a gate that nearly closes at every token of a long call are lost in float32.
        shift = OPEN if trial.key_length > MANY else 0.0
        inputs = {one.name: _activated(one, draw(*one.names) + shift) for one in drawn}
        axes = {one.name: one.names for one in drawn}
        return cls(q, k, v, trial.is_causal, _key_mask(trial), _segments(trial), inputs, axes)

    def tensors(self) -> dict[str, Tensor]:
        """Every floating tensor by name."""
        return {"q": self.q, "k": self.k, "v": self.v, **self.inputs}

    def mapped(self, change: Any) -> Given:
        """With every floating tensor as `change(name, tensor)` makes it."""
        made = {name: change(name, x) for name, x in self.tensors().items()}
        own = {name: made[name] for name in self.inputs}
        return replace(self, q=made["q"], k=made["k"], v=made["v"], inputs=own)

    def on(self, device: str) -> Given:
        """With every tensor there, masks too."""
        moved = self.mapped(lambda _, x: x.to(device))
        masks = (self.key_mask, self.segments)
        key_mask, segments = (None if x is None else x.to(device) for x in masks)
        return replace(moved, key_mask=key_mask, segments=segments)

    def select(self, samples: slice | None = None, keys: Any = None, queries: Any = None) -> Given:
        """Some samples, keys and queries; None: all. keys and queries are slices or lists."""
        axes = {
            "q": ("batch", "heads", "queries", "width"),
            "k": ("batch", "kv_heads", "keys", "width"),
            "v": ("batch", "kv_heads", "keys", "value_width"),
            **self.axes,
        }
        chosen = {"batch": samples, "keys": keys, "queries": queries}

        def cut(x: Tensor | None, names: tuple[str, ...]) -> Tensor | None:
            if x is None:
                return None
            for dim, name in enumerate(names):
                if chosen.get(name) is not None:
                    x = x[(slice(None),) * dim + (chosen[name],)]
            return x

        made = self.mapped(lambda name, x: cut(x, axes[name]))
        pairs = ("batch", "keys")
        return replace(made, key_mask=cut(self.key_mask, pairs), segments=cut(self.segments, pairs))

    def changed(self, token: int, value: float | Tensor, *, queries: bool = True) -> Given:
        """With everything that belongs to one token replaced. value: for q, k and v; the inputs
        keep theirs, whose range is their own."""
        first = self.k.shape[2] - self.q.shape[2]

        def change(name: str, x: Tensor) -> Tensor:
            place = token - first if name == "q" else token
            if name not in ("q", "k", "v") or (name == "q" and not queries) or place < 0:
                return x
            here = torch.arange(x.shape[2])[:, None] == place
            return torch.where(here, torch.as_tensor(value, dtype=x.dtype), x)

        return self.mapped(change)

    def without_padding(self, sample: int) -> tuple[Given, Tensor]:
        """One sample without its padded tokens, and the queries that are left of it, indices of its
        rows. As many queries as keys are needed."""
        assert self.key_mask is not None and self.q.shape[2] == self.k.shape[2]
        real = self.key_mask[sample].nonzero()[:, 0]
        one = slice(sample, sample + 1)
        return replace(self, key_mask=None).select(one, keys=real, queries=real), real

    def pieces(self) -> list[tuple[int, Tensor]]:
        """The sample and the tokens of every packed piece."""
        assert self.segments is not None
        return [
            (sample, (row == piece).nonzero()[:, 0])
            for sample, row in enumerate(self.segments)
            for piece in row.unique()
        ]


def is_drawn(one: Input) -> bool:
    """Whether a trial brings this input: whatever a call needs, and gates."""
    return one.dtype == "float" and (one.required or one.is_projected)


def _activated(one: Input, x: Tensor) -> Tensor:
    return x if one.activation is None else one.activation(x)


def _key_mask(trial: Trial) -> Tensor | None:
    length = trial.key_length
    if trial.padding == "none":
        return None
    mask = torch.ones(trial.batch_size, length, dtype=torch.bool)
    for sample, row in enumerate(mask):
        count = max(1, length // 3 - sample) if length > 1 else 0
        if trial.padding == "left":
            row[:count] = False
        elif trial.padding == "right":
            row[length - count :] = False
        elif trial.padding == "inside":
            row[1 + sample : length - 1 : 3] = False
        elif sample == 0:
            row[:] = False
    return mask


def _segments(trial: Trial) -> Tensor | None:
    if trial.pieces == 1:
        return None
    rows = []
    for sample in range(trial.batch_size):
        # Pieces of other lengths in every sample, none of them empty.
        ends = [(i * trial.key_length + sample % 2) // trial.pieces for i in range(trial.pieces)]
        row = torch.zeros(trial.key_length, dtype=torch.long)
        for end in ends[1:]:
            row[max(1, end) :] += 1
        rows.append(row)
    return torch.stack(rows)


def upstream_of(rows: Tensor) -> Tensor:
    """A gradient to send back, not the same for every entry."""
    return torch.arange(rows.numel(), dtype=torch.float64).cos().view(rows.shape).to(rows)
