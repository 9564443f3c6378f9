"""What decoding carries of a Fenwick tree: the states of its buckets, and how a token changes
them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call, repeat_heads
from attnzoo.eager import can_look
from attnzoo.engines.linear.gated.recurrence import advance
from attnzoo.engines.linear.gated.tokens import Rule, empty_state, prepared
from attnzoo.engines.linear.log_linear.tree import LEVELS, buckets_of
from attnzoo.engines.linear.log_linear.tree_chunks import Buckets, walk
from attnzoo.engines.linear.sums import Past


@dataclass(frozen=True)
class Tree(Past):
    """The buckets of the tokens so far.

    sums: (batch, kv_heads, buckets, width, value_dim), by the bit that is their number of tokens;
        0 where that bit of the sample's tokens is not set
    slots: how many tokens came, padded ones too
    tokens: (batch,), how many were real; None: all
    """

    slots: int = 0
    tokens: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [self.sums] if self.tokens is None else [self.sums, self.tokens]

    def select(self, rows: Tensor) -> Self:
        tokens = None if self.tokens is None else self.tokens.index_select(0, rows)
        return replace(self, sums=self.sums.index_select(0, rows), tokens=tokens)


def no_tokens(call: Call) -> Tree:
    """The tree before the first token."""
    return Tree(empty_state(call)[:, :, None][:, :, :0], None)


def one_by_one(rule: Rule, call: Call, tree: Tree) -> Iterator[tuple[Tensor, Tree]]:
    """A row, (batch, heads, 1, value_dim), and the tree after each token of a call with levels.
    Padded tokens leave it as it is, and their rows are 0."""
    ready = prepared(rule, call)
    step = _step_of_all if tree.tokens is None and call.key_mask is None else _step
    for token in range(call.key_length):
        here = slice(token, token + 1)
        one = ready if call.key_length == 1 else ready.select(queries=here, keys=here)
        rows, tree = step(rule, one, tree)
        yield rows, tree


def _step_of_all(rule: Rule, call: Call, tree: Tree) -> tuple[Tensor, Tree]:
    """As `_step`, where all samples have as many tokens: full buckets alone are touched. They stand
    side by side as values of one state, the token's own, still empty, last."""
    slots, width, kv_heads = tree.slots, call.v.shape[3], call.k.shape[1]
    full = _buckets(tree.sums, slots)
    empty = tree.sums.new_zeros(*tree.sums.shape[:2], *tree.sums.shape[3:])
    written = replace(call, v=F.pad(call.v, (len(full) * width, 0)))
    state = advance(rule, written, torch.cat([*full.values(), empty], -1))
    q, levels = (
        x[:, :, 0].unflatten(1, (kv_heads, -1)) for x in (call.q, call.inputs[LEVELS.name])
    )
    read = [levels[..., bit + 1, None] for bit in full] + [levels[..., 0, None]]
    rows = ((q @ state).unflatten(-1, (-1, width)) * torch.stack(read, -2)).sum(-2)
    *others, own = state.split(width, -1)
    after, bit = dict(zip(full, others, strict=True)), 0
    while bit in after:  # it merges with those of 1, 2, 4 ... tokens that are full
        own, bit = own + after.pop(bit), bit + 1
    after[bit] = own
    return rows.flatten(1, 2)[:, :, None], Tree(_stacked(after, slots + 1, empty), None, slots + 1)


def _step(rule: Rule, call: Call, tree: Tree) -> tuple[Tensor, Tree]:
    """As `one_by_one`, of one prepared token."""
    kv_heads, slots = call.k.shape[1], tree.slots + 1
    # The token's own bucket, empty, stands before the others; nothing is written to these.
    states = F.pad(tree.sums, (0, 0, 0, 0, 1, 0))
    count = states.shape[2]
    own = torch.zeros(count, 1, 1, dtype=call.v.dtype, device=call.v.device)
    own[0] = 1.0
    spread = call.of_each(lambda x, axes: repeat_heads(x, count) if "kv_heads" in axes else x)
    spread = replace(spread, v=(call.v[:, :, None] * own).flatten(1, 2))
    states = advance(rule, spread, states.flatten(1, 2)).unflatten(1, (kv_heads, -1))
    q, levels = (
        x[:, :, 0].unflatten(1, (kv_heads, -1)) for x in (call.q, call.inputs[LEVELS.name])
    )
    read = (q[:, :, None] @ states) * levels[..., :count].mT[..., None]
    rows = read.sum(2).flatten(1, 2)[:, :, None]
    seen, real = tree.tokens, call.key_mask
    if seen is None:
        seen = torch.full(rows.shape[:1], tree.slots, device=rows.device)
    missing = buckets_of(slots) - tree.sums.shape[2]
    after = _merged(F.pad(states, (0, 0, 0, 0, 0, missing)), seen)
    if real is None:
        return rows, Tree(after, None, slots, None if tree.tokens is None else seen + 1)
    before, real = F.pad(tree.sums, (0, 0, 0, 0, 0, missing)), real[:, :1]
    after = torch.where(real[..., None, None, None], after, before)
    return rows.masked_fill(~real[..., None, None], 0.0), Tree(
        after, None, slots, seen + real[:, 0]
    )


def _merged(states: Tensor, seen: Tensor) -> Tensor:
    """The buckets behind a token: its own, the first of `states`, merges with those of 1, 2, 4 ...
    tokens that are full, into the first that is not.

    states: (batch, kv_heads, 1 + buckets, ...). seen: (batch,), tokens before
    """
    bits = 1 << torch.arange(states.shape[2] - 1, device=states.device)
    changed = seen[:, None] ^ (seen[:, None] + 1)  # the bits up to the first that is 0
    full, taken = (changed & seen[:, None] & bits) != 0, (changed & ~seen[:, None] & bits) != 0
    full, taken = (x[:, None, :, None, None] for x in (full, taken))
    others = states[:, :, 1:]
    merged = states[:, :, :1] + others.masked_fill(~full, 0.0).sum(2, keepdim=True)
    return torch.where(taken, merged, others.masked_fill(full, 0.0))


def in_chunks(rule: Rule, call: Call, tree: Tree) -> Iterator[tuple[Tensor, Tree]]:
    """As `one_by_one`, some rows at a time, where all samples have as many real tokens, or where
    Python may look how many they have."""
    if call.key_mask is None and tree.tokens is None:
        yield from _alike(rule, call, tree)
    elif can_look(call.k, *([] if call.key_mask is None else [call.key_mask])):
        yield _each_apart(rule, call, tree)
    else:
        yield from one_by_one(rule, call, tree)


def _alike(rule: Rule, call: Call, tree: Tree) -> Iterator[tuple[Tensor, Tree]]:
    buckets, slots = _buckets(tree.sums, tree.slots), tree.slots
    for rows, length in walk(rule, call, slots, buckets):
        slots += length
        yield rows, Tree(_stacked(buckets, slots, tree.sums), None, slots)


def _each_apart(rule: Rule, call: Call, tree: Tree) -> tuple[Tensor, Tree]:
    """Sample by sample, without padding."""
    mask, slots = call.key_mask, tree.slots + call.key_length
    out, sums, tokens = [], [], []
    for sample in range(call.k.shape[0]):
        here = slice(sample, sample + 1)
        own = tree.sums[here]
        seen = tree.slots if tree.tokens is None else int(tree.tokens[sample])
        buckets = _buckets(own, seen)
        places = torch.arange(call.key_length, device=call.k.device)
        places = places if mask is None else places[mask[sample]]
        part = replace(call.select(batch=here, queries=places, keys=places), key_mask=None)
        rows = own.new_zeros(1, call.q.shape[1], call.key_length, own.shape[4])
        if len(places):
            found = walk(rule, part, seen, buckets)
            rows = rows.index_copy(2, places, torch.cat([some for some, _ in found], 2))
        out.append(rows)
        sums.append(_stacked(buckets, slots, own))
        tokens.append(seen + len(places))
    counts = torch.tensor(tokens, device=call.k.device)
    return torch.cat(out), Tree(torch.cat(sums), None, slots, counts)


def _buckets(sums: Tensor, tokens: int) -> Buckets:
    return {bit: sums[:, :, bit] for bit in range(buckets_of(tokens)) if tokens >> bit & 1}


def _stacked(buckets: Buckets, slots: int, like: Tensor) -> Tensor:
    """The buckets of so many tokens or fewer, as `Tree.sums`."""
    empty = like.new_zeros(*like.shape[:2], *like.shape[-2:])
    return torch.stack([buckets.get(bit, empty) for bit in range(buckets_of(slots))], 2)
