"""A decoding state with global tokens: the keys that a window still reaches, and the keys of global tokens, which stay."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnzoo.call import Call, UnsupportedError
from attnzoo.engines.cache import KeyValueCache


@dataclass(frozen=True)
class GlobalCache:
    """window: the last keys, in whose key_mask global tokens are hidden. k, v, key_mask: those of the global tokens, (batch, kv_heads, kept,
    head_dim) and (batch, kept), False where a sample has fewer. real: real tokens of every sample so far, (batch,). first: how many
    of these are global without being named; all_found: every sample has had that many."""

    window: KeyValueCache
    global_k: Tensor
    global_v: Tensor
    global_key_mask: Tensor
    real: Tensor
    first: int
    all_found: bool

    @classmethod
    def around(cls, window: KeyValueCache, first: int) -> GlobalCache:
        """An empty state."""
        k, v = window.k, window.v
        mask = torch.zeros(window.batch_size, 0, dtype=torch.bool, device=k.device)
        return cls(window, k, v, mask, mask.sum(1), first, first == 0)

    @property
    def k(self) -> Tensor:
        """The keys that the next query can read: of the global tokens, then of the window."""
        return _joined(self.global_k, self.window.k)

    @property
    def v(self) -> Tensor:
        return _joined(self.global_v, self.window.v)

    @property
    def kept(self) -> int:
        """Slots for global tokens."""
        return self.global_k.shape[2]

    @property
    def batch_size(self) -> int:
        return self.window.batch_size

    @property
    def seen(self) -> int:
        return self.window.seen

    def elements(self) -> int:
        return self.window.elements() + self.global_k.numel() + self.global_v.numel()

    def held_bytes(self) -> int:
        return self.window.held_bytes() + sum(x.nbytes for x in (self.global_k, self.global_v, self.global_key_mask, self.real))

    def check_room(self, call: Call) -> None:
        self.window.check_room(call)

    def select(self, rows: Tensor) -> GlobalCache:
        """The state of these rows of the batch, (new_batch,) indices; a row may be taken more than once."""
        k, v, mask, real = (x.index_select(0, rows) for x in (self.global_k, self.global_v, self.global_key_mask, self.real))
        return replace(self, window=self.window.select(rows), global_k=k, global_v=v, global_key_mask=mask, real=real)

    def new_globals(self, call: Call, window: int) -> Tensor | None:
        """The global tokens among the call's, (batch, new_tokens) bool; None when there are none.

        Raises UnsupportedError where a row of theirs would need what the state has dropped.
        """
        if torch.jit.is_tracing():
            raise UnsupportedError("which tokens are global decides what a state keeps, so its steps cannot be traced; trace whole sequences instead")
        mask = call.global_mask
        if mask is not None and call.key_mask is not None:
            mask = mask & call.key_mask
        if mask is not None and self.seen >= window and bool(mask.any()):
            raise UnsupportedError(
                f"a global token after {self.seen} others needs keys that the state has dropped; name global tokens within the first {window} tokens"
            )
        if not self.all_found:
            named = self._reals(call)
            first = named & (self.real[:, None] + named.cumsum(1) <= self.first)
            mask = first if mask is None else first | mask
        if mask is None or not bool(mask.any()):
            return None
        if call.global_qkv is not None and self.seen:
            raise UnsupportedError("a global token with a projection of its own must come in the first step: the state has no such keys of the past")
        return mask

    def is_unmasked(self, call: Call) -> bool:
        """Whether nothing is hidden, in the window or in the call."""
        return self.window.key_mask is None and call.key_mask is None

    def joined(self, call: Call, mask: Tensor | None) -> Call:
        """One call over all keys. mask: the global tokens among the call's own."""
        past, new = self.window.k.shape[2], self._reals(call)
        near = self.window.key_mask
        near = new.new_ones(self.batch_size, past) if near is None else near
        named = torch.cat([self.global_key_mask, torch.zeros_like(near), torch.zeros_like(new) if mask is None else mask], 1)
        return replace(
            call,
            k=_joined(self.global_k, self.window.k, call.k),
            v=_joined(self.global_v, self.window.v, call.v),
            key_mask=torch.cat([self.global_key_mask, near, new], 1),
            global_mask=named,
            global_qkv=None if mask is None else call.global_qkv,  # then they are of all keys: there is no past
        )

    def append(self, call: Call, mask: Tensor | None, slots: Tensor | None) -> GlobalCache:
        """The state behind the call's tokens, of which those in `mask` are global; slots: theirs, (batch, most of a sample), then any others."""
        real = self._reals(call)
        counted = self.real + real.sum(1)
        all_found = self.all_found or bool((counted >= self.first).all())
        if mask is None or slots is None:
            return replace(self, window=self.window.append(replace(call, global_mask=None, global_qkv=None)), real=counted, all_found=all_found)
        k, v = _joined(self.global_k, fetched(call.k, slots)), _joined(self.global_v, fetched(call.v, slots))
        kept = torch.cat([self.global_key_mask, mask.gather(1, slots)], 1)
        window = self.window.append(replace(call, key_mask=real & ~mask))
        return GlobalCache(window, k, v, kept, counted, self.first, all_found)

    def _reals(self, call: Call) -> Tensor:
        return self.real.new_ones(self.batch_size, call.key_length, dtype=torch.bool) if call.key_mask is None else call.key_mask


def fetched(x: Tensor, slots: Tensor) -> Tensor:
    """(batch, heads, length, d) and (batch, count) -> (batch, heads, count, d)."""
    return x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _joined(*parts: Tensor) -> Tensor:
    """Along the length; an empty past says nothing of dtype and width."""
    filled = [part for part in parts if part.shape[2]]
    return torch.cat(filled, 2) if len(filled) > 1 else filled[0] if filled else parts[-1]
