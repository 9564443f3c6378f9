"""A decoding state with keys that stay, of global tokens or sinks, beside those that a window still
reaches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnzoo.call import Call, UnsupportedError
from attnzoo.engines.softmax.cache import KeyValueCache
from attnzoo.engines.softmax.distance_bias import DISTANCE_BIAS, KEY_POSITIONS, check_reach
from attnzoo.engines.state_checks import (
    GOES_BACK,
    check_crop,
    check_rows,
    check_state,
    check_values,
)
from attnzoo.sequences.padding import fetched, first_real, slots_of


@dataclass(frozen=True)
class GlobalCache:
    """The keys that the next query can read: those that stay, then those of the window.

    window: the last keys, in whose key_mask those that stay are hidden
    global_k, global_v: (batch, kv_heads, kept, head_dim or value_dim), keys and values that stay
    global_key_mask: (batch, kept) bool, False where a sample has fewer; None: all have as many
    real: (batch,), real tokens of every sample so far; None: all have been real
    first: how many of these stay without being named
    all_found: whether every sample has had that many
    seen: tokens taken so far
    max_length: tokens that the state may take; None: any number
    places: (batch, kept), which tokens stay, counted from the first one; None: the first slots
    """

    window: KeyValueCache
    global_k: Tensor
    global_v: Tensor
    global_key_mask: Tensor | None
    real: Tensor | None
    first: int
    all_found: bool
    seen: int
    max_length: int | None
    places: Tensor | None = None

    @classmethod
    def around(cls, window: KeyValueCache, first: int) -> GlobalCache:
        """An empty state.

        window: an empty cache of the keys that the window reaches
        first: how many of the first real tokens stay
        """
        return cls(window, window.k, window.v, None, None, first, first == 0, 0, window.max_length)

    @property
    def k(self) -> Tensor:
        return _joined(self.global_k, self.window.k)

    @property
    def v(self) -> Tensor:
        return _joined(self.global_v, self.window.v)

    @property
    def kept(self) -> int:
        """Slots for keys that stay."""
        return self.global_k.shape[2]

    @property
    def batch_size(self) -> int:
        return self.window.batch_size

    def elements(self) -> int:
        """Numbers that the next query can read."""
        return self.window.elements() + self.global_k.numel() + self.global_v.numel()

    def held_bytes(self) -> int:
        """Bytes of its tensors, with what the window holds in reserve and for going back."""
        held = (self.global_k, self.global_v, self.global_key_mask, self.real, self.places)
        return self.window.held_bytes() + sum(x.nbytes for x in held if x is not None)

    def check_room(self, call: Call) -> None:
        check_state(
            call, self.batch_size, self.window.buffer.k.shape[1], self.seen, self.max_length
        )
        check_values(call, self.global_v if self.seen else None, of_one_dtype=True)

    def select(self, rows: Tensor) -> GlobalCache:
        """The state of these rows of the batch, (new_batch,) indices; a row may be taken more than
        once."""
        check_rows(rows, self.batch_size)
        chosen = (
            None if x is None else x.index_select(0, rows)
            for x in (self.global_k, self.global_v, self.global_key_mask, self.real, self.places)
        )
        k, v, key_mask, real, places = chosen
        assert k is not None and v is not None
        state = replace(self, window=self.window.select(rows), real=real)
        return replace(state, global_k=k, global_v=v, global_key_mask=key_mask, places=places)

    @property
    def croppable(self) -> int:
        """How many tokens can be taken back."""
        return self.window.croppable if self.window.dropped else self.seen

    def crop(self, n: int) -> GlobalCache:
        """The state without its last n tokens, as `KeyValueCache.crop`; those among them that
        would stay go too."""
        check_crop(n, self.croppable)
        if not n:
            return self
        with torch.enable_grad():  # keys that stay keep their history, wherever this is called
            return self._without(n)

    def _without(self, n: int) -> GlobalCache:
        """As `crop`, of an n that is allowed and not 0."""
        seen = self.seen - n
        near = min(n, self.window.seen)  # the first slots may stand beside the window alone
        state = replace(self, window=self.window.crop(near), seen=seen)
        if self.real is None:
            k, v = self.global_k[:, :, :seen], self.global_v[:, :, :seen]
            return replace(state, global_k=k, global_v=v, all_found=seen >= self.first)
        key_mask = self.window.key_mask
        stays, early = self._stays(), self._places() < seen
        lost = (stays & ~early).sum(1)
        lost += near if key_mask is None else key_mask[:, key_mask.shape[1] - near :].sum(1)
        real = self.real - lost
        found = bool((real >= self.first).all())
        state = replace(state, real=real, all_found=found)
        return state._holding(self.global_k, self.global_v, stays & early, self._places())

    def new_globals(self, call: Call) -> Tensor | None:
        """The tokens among the call's that stay, (batch, new_tokens) bool; None when there are
        none.

        Raises UnsupportedError where a row of theirs would need what the state has dropped.
        """
        if torch.jit.is_tracing() and not self._counts_slots(call):
            raise UnsupportedError(
                "which tokens are global decides what a state keeps, so its steps cannot be "
                "traced; trace whole sequences instead"
            )
        mask, reach = call.get("global_mask"), self.window.reach
        if mask is not None and reach is not None and self.seen > reach and bool(mask.any()):
            raise UnsupportedError(
                f"a global token after {self.seen} others needs keys that the state has dropped; "
                f"name global tokens within the first {reach + 1} tokens"
            )
        if not self.all_found:
            mask = self._among_first(call) if mask is None else self._among_first(call) | mask
        if mask is None or not (self._counts_slots(call) or bool(mask.any())):
            return None
        return mask

    def _counts_slots(self, call: Call) -> bool:
        """Whether every token so far, those of the call included, is real and none is named, so
        that the first ones are the first slots and nobody must look at a value."""
        return self.real is None and call.key_mask is None and "global_mask" not in call.inputs

    def _among_first(self, call: Call) -> Tensor:
        """Those of the call's tokens that are among the first real ones of their sample."""
        reals = self._reals(call)
        if self.real is None:
            return first_real(reals, self.first - self.seen)
        return reals & (self.real[:, None] + reals.cumsum(1) <= self.first)

    def is_window(self, call: Call) -> bool:
        """Whether nothing has stayed and no token of the call will, so that a window of all that
        comes is all that its queries read, and its keys lie together in the state behind it."""
        few = call.key_length <= GOES_BACK and not self.kept
        return few and self.all_found and self._counts_slots(call)

    def joined(self, call: Call, mask: Tensor | None = None) -> tuple[Call, Tensor]:
        """One call over all keys, and which of these are global, (batch, key_length) bool.

        call: of the new tokens
        mask: (batch, new_tokens) bool, those among them that stay; None: none
        """
        window = self.window.within_reach()
        k, v = (
            _joined(self.global_k, window.k, call.k),
            _joined(self.global_v, window.v, call.v),
        )
        new, past = self._reals(call), window.kept
        stays = self._stays()
        near, key_mask = window.key_mask, None
        if near is not None or self.global_key_mask is not None or call.key_mask is not None:
            near = new.new_ones(self.batch_size, past) if near is None else near
            key_mask = torch.cat([stays, near, new], 1)
        named = [
            stays,
            new.new_zeros(self.batch_size, past),
            torch.zeros_like(new) if mask is None else mask,
        ]
        whole = call.over(call.q, k, v, key_mask)
        if DISTANCE_BIAS.name in call.inputs and self.kept:
            whole = whole.giving(KEY_POSITIONS, self._positions(k.shape[2], new.shape[1]))
            check_reach(whole, self.seen + new.shape[1] - 1)
        return whole, torch.cat(named, 1)

    def _positions(self, length: int, new: int) -> Tensor:
        """Where the keys stand that the next queries can read, (batch, length), if the last of
        `new` more stands at length - 1."""
        slots = torch.arange(self.kept, length, device=self.global_k.device)
        ahead = self._places() - (self.seen + new - length)
        return torch.cat([ahead, slots.expand(self.batch_size, -1)], 1)

    def append(self, call: Call, mask: Tensor | None) -> GlobalCache:
        """The state behind the call's tokens.

        call: of the new tokens
        mask: (batch, new_tokens) bool, those among them that stay; None: none
        """
        seen = self.seen + call.key_length
        if self._counts_slots(call):
            taken = 0 if mask is None else min(self.first - self.seen, call.key_length)
            k, v = self.global_k, self.global_v
            if taken:  # copied: a slice would hold on to the whole call, which is the caller's
                k, v = (
                    _joined(old, x[:, :, :taken].clone()) for old, x in ((k, call.k), (v, call.v))
                )
            rest = call.select(keys=slice(taken, None)) if taken else call
            window = self.window
            if taken < call.key_length:
                window = window.append(rest).without_excess()
            found = self.all_found or seen >= self.first
            return replace(self, window=window, global_k=k, global_v=v, all_found=found, seen=seen)
        reals = self._reals(call)
        before = (
            reals.new_full((self.batch_size,), self.seen, dtype=torch.long)
            if self.real is None
            else self.real
        )
        real = before + reals.sum(1)
        found = self.all_found or bool((real >= self.first).all())
        state = replace(self, real=real, all_found=found, seen=seen)
        if mask is None:
            return replace(state, window=self.window.append(call).without_excess())
        slots = slots_of(mask, int(mask.sum(1).amax()))
        k, v = (
            _joined(old, fetched(x, slots))
            for old, x in ((self.global_k, call.k), (self.global_v, call.v))
        )
        kept = torch.cat([self._stays(), mask.gather(1, slots)], 1)
        places = torch.cat([self._places(), self.seen + slots], 1)
        window = self.window.append(replace(call, key_mask=reals & ~mask)).without_excess()
        return replace(state, window=window)._holding(k, v, kept, places)

    def _holding(self, k: Tensor, v: Tensor, kept: Tensor, places: Tensor) -> GlobalCache:
        """The state with these keys that stay, of which those in `kept`, (batch, slots) bool, are
        some sample's."""
        most = int(kept.sum(1).amax())
        if most < kept.shape[1]:  # samples found theirs in different steps, or lost some
            slots = slots_of(kept, most)
            k, v = fetched(k, slots), fetched(v, slots)
            kept, places = kept.gather(1, slots), places.gather(1, slots)
        return replace(self, global_k=k, global_v=v, global_key_mask=kept, places=places)

    def _stays(self) -> Tensor:
        """Which of the slots for keys that stay are taken, (batch, kept)."""
        if self.global_key_mask is not None:
            return self.global_key_mask
        device = self.global_k.device
        return torch.ones(self.batch_size, self.kept, dtype=torch.bool, device=device)

    def _places(self) -> Tensor:
        if self.places is not None:
            return self.places
        return torch.arange(self.kept, device=self.global_k.device).expand(self.batch_size, -1)

    def _reals(self, call: Call) -> Tensor:
        ones = torch.ones(self.batch_size, call.key_length, dtype=torch.bool, device=call.k.device)
        return ones if call.key_mask is None else call.key_mask


def _joined(*parts: Tensor) -> Tensor:
    """Along the length; an empty past says nothing of dtype and width."""
    filled = [part for part in parts if part.shape[2]]
    return torch.cat(filled, 2) if len(filled) > 1 else filled[0] if filled else parts[-1]
