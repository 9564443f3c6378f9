"""A decoding state with attention sinks: the first keys, which stay, and the last ones that a window still reaches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.cache import KeyValueCache, check_state
from attnzoo.patterns import Window


@dataclass(frozen=True)
class SinkCache:
    """first: up to `sinks` slots; last: those behind them that a window reaches. Side by side they are the keys that the next query can read:
    what was dropped lay between, and a query that stands at the end sees the others at their own distance."""

    first: KeyValueCache
    last: KeyValueCache
    sinks: int
    max_length: int | None

    @classmethod
    def empty(
        cls, batch_size: int, kv_heads: int, head_dim: int, max_length: int | None, pattern: Window, dtype: torch.dtype, device: Any
    ) -> SinkCache:
        first = KeyValueCache.empty(batch_size, kv_heads, head_dim, pattern.sinks, None, dtype, device)
        last = KeyValueCache.empty(batch_size, kv_heads, head_dim, None, pattern.near - 1, dtype, device)
        return cls(first, last, pattern.sinks, max_length)

    @property
    def k(self) -> Tensor:
        return torch.cat([self.first.k, self.last.k], 2) if self.last.seen else self.first.k

    @property
    def v(self) -> Tensor:
        return torch.cat([self.first.v, self.last.v], 2) if self.last.seen else self.first.v

    @property
    def key_mask(self) -> Tensor | None:
        masks = [cache.key_mask for cache in (self.first, self.last)]
        if masks == [None, None]:
            return None
        ones = torch.ones(self.batch_size, self.k.shape[2], dtype=torch.bool, device=self.k.device)
        parts = zip(masks, ones.split([self.first.k.shape[2], self.last.k.shape[2]], 1), strict=True)
        return torch.cat([ones if mask is None else mask for mask, ones in parts], 1)

    @property
    def batch_size(self) -> int:
        return self.first.batch_size

    @property
    def seen(self) -> int:
        return self.first.seen + self.last.seen

    def elements(self) -> int:
        """Numbers that the next query can read."""
        return self.first.elements() + self.last.elements()

    def held_bytes(self) -> int:
        """Bytes of the buffers, with what they hold in reserve."""
        return self.first.held_bytes() + self.last.held_bytes()

    def select(self, rows: Tensor) -> SinkCache:
        """The state of these rows of the batch, (new_batch,) indices; a row may be taken more than once."""
        return replace(self, first=self.first.select(rows), last=self.last.select(rows))

    def check_room(self, call: Call) -> None:
        check_state(call, self.batch_size, self.first.buffer.k.shape[1], self.seen, self.max_length)

    def append(self, call: Call) -> SinkCache:
        """The state with the call's keys and values behind it."""
        new = call.k.shape[2]
        taken = min(self.sinks - self.first.seen, new)
        first = self.first.append(_slots(call, 0, taken)) if taken else self.first
        last = self.last.append(_slots(call, taken, new)) if taken < new else self.last
        return replace(self, first=first, last=last)


def _slots(call: Call, start: int, stop: int) -> Call:
    key_mask = None if call.key_mask is None else call.key_mask[:, start:stop]
    return replace(call, k=call.k[:, :, start:stop], v=call.v[:, :, start:stop], key_mask=key_mask)
