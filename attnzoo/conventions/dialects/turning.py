"""What a call has, turned from one library's spelling into another's."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from attnzoo.arguments import check_choice, check_count, check_positive
from attnzoo.conventions.dialects.facts import HEADS_SECOND, SPELLINGS
from attnzoo.conventions.dialects.spelling import Spelling

_LAYOUTS = {"batch heads length width": None, HEADS_SECOND: (1, 2)}


def to(name: str, **ours: Any) -> dict[str, Any]:
    """What a library calls the same thing.

    name: a key of `SPELLINGS`
    ours: any of q, k, v (batch, heads, length, width), window (keys of a causal window, the
        query's own included), key_mask (bool, True = attend), log_decay (natural logarithm, at
        most 0, (batch, heads, length) or with a width), state (batch, heads, width, value_dim)
    returns: the same names with values as the library takes them
    raises: ValueError on an unknown library or name, and on what it has no word for
    """
    return _turned(name, ours, back=False)


def from_(name: str, **theirs: Any) -> dict[str, Any]:
    """The inverse of `to`: what a library's values are here."""
    return _turned(name, theirs, back=True)


def _turned(name: str, given: dict[str, Any], *, back: bool) -> dict[str, Any]:
    spelling = SPELLINGS[check_choice("dialect", name, list(SPELLINGS))]
    turns = {
        **dict.fromkeys(("q", "k", "v"), _layout),
        "window": _window,
        "key_mask": _mask,
        "log_decay": _decay,
        "state": _state,
    }
    for word in given:
        check_choice("name", word, list(turns))
    return {word: turns[word](spelling, word, value, back) for word, value in given.items()}


def _layout(spelling: Spelling, word: str, x: Tensor, back: bool) -> Tensor:
    if spelling.layout not in _LAYOUTS:
        raise ValueError(
            f"{spelling.name} takes {spelling.layout}, which holds no {word} of four axes; bring "
            "heads and width together yourself"
        )
    if not isinstance(x, Tensor) or x.dim() != 4:
        found = tuple(x.shape) if isinstance(x, Tensor) else repr(x)
        raise ValueError(f"{word} must be a tensor of four axes, {spelling.layout}; got {found}")
    axes = _LAYOUTS[spelling.layout]
    return x if axes is None else x.transpose(*axes)


def _window(spelling: Spelling, word: str, window: int, back: bool) -> int:
    if spelling.window_keys is None:
        raise ValueError(f"{spelling.name} has no word for a window; give it a mask")
    turned = window + spelling.window_keys if back else window - spelling.window_keys
    ours, theirs = (turned, window) if back else (window, turned)
    check_positive("window", ours)  # in keys, the query's own included
    check_count("window", theirs)
    return turned


def _mask(spelling: Spelling, word: str, mask: Tensor, back: bool) -> Tensor:
    if not spelling.mask:
        raise ValueError(f"{spelling.name} has no word for key_mask")
    if spelling.mask == "True = hidden":
        return ~mask
    if spelling.mask == "1 = attend":
        return mask.bool() if back else mask.long()
    if spelling.mask == "added":
        return mask > -math.inf if back else mask.float().log()
    return mask


def _decay(spelling: Spelling, word: str, decay: Tensor, back: bool) -> Tensor:
    if not spelling.decay:
        raise ValueError(f"{spelling.name} has no word for log_decay")
    if spelling.decay == "factor":
        decay = decay.log() if back else decay.exp()
    elif spelling.decay == "logarithm to 2":
        decay = decay * math.log(2) if back else decay / math.log(2)
    return decay.transpose(1, 2) if spelling.layout == HEADS_SECOND else decay


def _state(spelling: Spelling, word: str, state: Tensor, back: bool) -> Tensor:
    if not spelling.state:
        raise ValueError(f"{spelling.name} has no word for a state")
    return state.mT if spelling.state == "value_dim width" else state
