"""Checks of calls that meet a decoding state: each raises a ValueError, one sentence."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import can_look

#: How many tokens of a long last call a bounded state can take back; of a shorter one, all.
GOES_BACK = 128


def check_state(
    call: Call, batch_size: int, kv_heads: int, seen: int, max_length: int | None
) -> None:
    """Raise a ValueError when the call's tokens do not fit the state."""
    if call.k.shape[0] != batch_size:
        raise ValueError(
            f"the state was made for batch_size={batch_size}; k has batch size {call.k.shape[0]}"
        )
    if call.k.shape[1] != kv_heads:
        raise ValueError(
            f"the state was made for kv_heads={kv_heads}; k has {call.k.shape[1]} heads: pass "
            "kv_heads to init_state"
        )
    if max_length is not None and seen + call.k.shape[2] > max_length:
        raise ValueError(
            f"the state has taken {seen} tokens and {call.k.shape[2]} more would pass its "
            f"max_length={max_length}; make one with a larger max_length"
        )


def check_values(call: Call, held: Tensor | None, *, of_one_dtype: bool = False) -> None:
    """Raise a ValueError when the call's values are not as those that a state has taken.

    held: some of these, (..., value_dim); None: it has taken none, and any will do
    of_one_dtype: whether a state of wider numbers cannot take narrower ones either
    """
    if held is None:
        return
    width, dtype = held.shape[-1], held.dtype
    if call.v.shape[3] != width:
        raise ValueError(
            f"v has value_dim={call.v.shape[3]} and the state holds values of {width}; go on with "
            "those, or begin with a new state from init_state"
        )
    if call.v.dtype != dtype and (
        of_one_dtype or torch.promote_types(call.v.dtype, dtype) != dtype
    ):
        raise ValueError(
            f"the tokens are {call.v.dtype} and the state has taken {dtype}; convert them with "
            f".to({dtype}), or begin with a new state from init_state"
        )


def check_rows(rows: Tensor, batch_size: int) -> None:
    """Raise a ValueError when these are no indices of samples of a state."""
    is_index = isinstance(rows, Tensor) and rows.dtype in (torch.int32, torch.int64)
    if not is_index or rows.dim() != 1:
        found = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else repr(rows)
        raise ValueError(
            f"rows is {found}; give the indices of samples as an integer tensor of one dimension"
        )
    if not rows.numel() or not can_look(rows):
        return
    least, most = int(rows.min()), int(rows.max())
    if least < 0 or most >= batch_size:
        raise ValueError(
            f"rows holds {least if least < 0 else most}, and the state has {batch_size} samples, "
            f"0 to {batch_size - 1}"
        )


def check_crop(n: int, most: int) -> None:
    """Raise a ValueError when a state cannot take n tokens back, but `most` of them."""
    if not isinstance(n, int) or isinstance(n, bool) or not 0 <= n <= most:
        raise ValueError(
            f"n={n!r} must be a whole number from 0 to {most}, the tokens that this state can take "
            f"back (a bounded one: those of its last call, at most {GOES_BACK}); to go back "
            "further, keep the state from before them, which stays valid"
        )
