"""Backend `tiles` of forgetting attention: a few rows at a time, with the keys that they still see.

A key that has faded so far that no score could bring it back is not read (Lin et al. 2025, Adaptive
Computation Pruning, arXiv:2504.06949). A row's sum is at least the exponential of its own token's
score o; a score is at most u = scale · |q| · max |k|. So all keys with

    log_decay_{j+1} + … + log_decay_i < o - u - log n + log ε

together weigh less than ε, which is a quarter of what rounding sees.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.softmax.decay_bias import LOG_DECAY, summed
from attnzoo.engines.softmax.reference import SoftmaxReference, reference
from attnzoo.engines.softmax.tiles import row_tiles, tiles
from attnzoo.engines.softmax.tiles.tile_pieces import Cap, Slices, cap

FEWEST_ROWS = 8  # below, a mask of all scores is small, and one product faster than many


def why_not(engine: SoftmaxReference, call: Call) -> str | None:
    """Why this backend refuses the call; None when it takes it."""
    if LOG_DECAY.name not in call.inputs:
        return "without log_decay it is softmax attention, which sdpa computes"
    if call.query_length < FEWEST_ROWS:
        return f"{call.query_length} rows are below the {FEWEST_ROWS} that it is for: use sdpa"
    return tiles.cannot_work_alone(engine, call)


def attend(engine: SoftmaxReference, call: Call) -> Tensor:
    """A·v, (batch, heads, query_length, value_dim) in q's dtype, of a call that `why_not`
    accepts."""
    log_decay = call.inputs[LOG_DECAY.name]
    openly, pieces = partial(reference, engine), partial(_pieces, engine)
    return row_tiles.attend(engine, call, openly, pieces, log_decay=log_decay)


@torch.no_grad()
def _visible_from(
    engine: SoftmaxReference, call: Call, sums: Tensor, closings: Tensor
) -> list[list[list[int]]]:
    """The first key that any row of a tile reads, of every sample, head and tile.

    sums, closings: as `decay_bias.summed` gives them
    """
    scale, offset, keys = abs(engine.scale_of(call.q)), max(0, call.offset), call.key_length
    blind = max(0, -call.offset)  # rows before the first key, which read nothing
    q, k = call.q[:, :, blind:], call.k.repeat_interleave(call.group, 1)
    largest = k.norm(dim=-1).amax(-1, keepdim=True)
    upper = (q.norm(dim=-1) * largest * scale).double()
    own = (q * k[:, :, offset:]).sum(-1).double() * engine.scale_of(call.q)
    if call.key_mask is not None:  # where a row's own token is hidden, another stands for it
        own = torch.where(call.key_mask[:, None, offset:], own, -upper)
    rounding = torch.finfo(call.q.dtype).eps / 8
    least = own - upper - math.log(keys) + math.log(rounding)
    rows = slice(offset, None)
    found = torch.maximum(
        torch.searchsorted(-sums, least - sums[..., rows]),
        torch.searchsorted(closings, closings[..., rows].contiguous()),
    )
    positions = torch.arange(offset, keys, device="cpu")
    found = torch.minimum(found, positions)  # a row reads its own key, whatever its numbers
    found = torch.nn.functional.pad(found, (blind, 0))
    starts = row_tiles.starts_of(call.query_length, keys)
    parts = found.split(starts.step, -1)
    return torch.stack([part.amin(-1) for part in parts], -1).tolist()


def _pieces(engine: SoftmaxReference, call: Call) -> list[list[Slices]]:
    """The tiles of every sample and head."""
    sums, closings = (x.detach() for x in summed(call.inputs[LOG_DECAY.name]))
    heads = []
    for sample, of_sample in enumerate(_visible_from(engine, call, sums, closings)):
        for head, lows in enumerate(of_sample):
            own = closings[sample, head]
            tiles_of_head = row_tiles.row_tiles(call, lows, FadingTile)
            heads.append([_with_closings(tile, own, call.q) for tile in tiles_of_head])
    return heads


def _with_closings(tile: Slices, closings: Tensor, like: Tensor) -> Slices:
    """The tile in which a row sees no key from before a gate that has closed."""
    _, size, keys = tile.shape
    first = tile.origin + tile.first
    if not keys or closings[tile.low] == closings[tile.low + keys - 1]:
        return tile
    positions = torch.arange(first, first + size, device="cpu").clamp(min=0)
    same = closings[positions][:, None] == closings[tile.low : tile.low + keys]
    return replace(tile, caps=(*tile.caps, Cap(0, keys, cap(same, like))))


class FadingTile(Slices):
    """A tile whose bias are the sums of a head's gates, (keys,) in float64."""

    def add_bias(self, bias: Tensor, scores: Tensor) -> None:
        _, size, keys = self.shape
        first = self.origin + self.first
        before = max(0, first - self.low)  # keys before the first row
        own = bias[max(first, 0) : first + size]
        if before:
            # Both parts are at most 0: their sum is as exact as each of them.
            far = scores[:, size - len(own) :, :before]
            far.add_((own - own[0]).to(scores.dtype)[:, None])
            far.add_((own[0] - bias[self.low : first]).to(scores.dtype))
        near = bias[self.low + before : self.low + keys]
        added = (own[:, None] - near).to(scores.dtype)
        scores[:, size - len(own) :, before:].add_(added)
