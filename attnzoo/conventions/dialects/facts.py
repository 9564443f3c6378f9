"""How libraries spell attention: layout, windows, alignment, masks, decays and states; and calls
turned from one spelling into another.

Here q, k and v are (batch, heads, length, width), a causal window of w is w keys, the last query
stands beside the last key, masks are True = attend, a decay is a natural logarithm of at most 0,
and a state is (batch, heads, width, value_dim).
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from attnzoo.arguments import check_choice, check_count, check_positive
from attnzoo.conventions.dialects.spelling import Spelling

HEADS_SECOND = "batch length heads width"
DATE = "2026-11-30"
SEEN = ("layout", "alignment", "hidden_row", "mask")
WITH_WINDOW = (*SEEN, "window_keys")
#: By name, in the order of the page.
SPELLINGS = {
    one.name: one
    for one in (
        Spelling(
            "attnzoo",
            "",
            window_keys=0,
            alignment="last",
            hidden_row="0",
            mask="True = attend",
            decay="natural logarithm",
            state="width value_dim",
            note="a NaN in a padded or future slot reaches no row that must not see it",
        ),
        Spelling(
            "torch.sdpa",
            "2.13.0",
            alignment="first",
            hidden_row="0",
            mask="True = attend",
            note="a NaN in a hidden value makes the row NaN",
            tested=SEEN,
            date=DATE,
        ),
        Spelling(
            "torch.MultiheadAttention",
            "2.13.0",
            "batch length width",
            hidden_row="NaN",
            mask="True = hidden",
            note="key_padding_mask and attn_mask alike; a hidden row is 0 where no weights are "
            "asked for",
            tested=("layout", "hidden_row", "mask"),
            date=DATE,
        ),
        Spelling(
            "transformers",
            "5.23.0",
            window_keys=0,
            alignment="last",
            hidden_row="mean of v",
            mask="1 = attend",
            decay="natural logarithm",
            state="width value_dim",
            note="eager; rows come back as batch length heads width; ModernBERT's "
            "local_attention=8 is 9 keys; Mamba-2's state is value_dim width",
            tested=(*WITH_WINDOW, "decay", "state"),
            date=DATE,
        ),
        Spelling(
            "fla",
            "0.6.0",
            HEADS_SECOND,
            window_keys=0,
            decay="natural logarithm",
            state="width value_dim",
            note="operators; the layers of GLA, Gated DeltaNet and KDA keep value_dim width; the "
            "recurrent naive gated delta rule takes (beta, g), the chunked one (g, beta)",
            tested=("layout", "decay", "state"),
            date=DATE,
        ),
        Spelling(
            "attention-gym",
            "0.0.17",
            HEADS_SECOND,
            decay="logarithm to 2",
            state="value_dim width",
            note="KDA",
            tested=("layout", "decay", "state"),
            date=DATE,
        ),
        Spelling(
            "mamba-ssm",
            "2",
            HEADS_SECOND,
            decay="natural logarithm",
            state="value_dim width",
            note="the gate is dt · A; scale 1",
        ),
        Spelling(
            "rwkv",
            "0.8.32",
            HEADS_SECOND,
            decay="factor",
            state="value_dim width",
            note="scale 1; keys are divided by max(norm, 1e-12)",
            tested=("state",),
            date=DATE,
        ),
        Spelling(
            "flash-attn",
            "2.8",
            HEADS_SECOND,
            window_keys=1,
            alignment="last",
            hidden_row="0",
            note="window_size=(w, 0) is w keys to the left and the query's own",
        ),
        Spelling(
            "xformers",
            "0.0.35",
            HEADS_SECOND,
            window_keys=0,
            alignment="first",
            mask="added",
            note="LowerTriangularFromBottomRightMask, and its window, stand at the last key",
            tested=("window_keys", "alignment"),
            date=DATE,
        ),
        Spelling(
            "jax.nn",
            "0.10.2",
            HEADS_SECOND,
            window_keys=1,
            mask="True = attend",
            note="local_window_size=w",
            alignment="first",
            hidden_row="mean of v",
            tested=WITH_WINDOW,
            date=DATE,
        ),
        Spelling(
            "keras",
            "3.15.1",
            HEADS_SECOND,
            window_keys=0,
            mask="True = attend",
            note="ops.dot_product_attention; the window is of layers.GroupQueryAttention",
            alignment="first",
            hidden_row="mean of v",
            tested=WITH_WINDOW,
            date=DATE,
        ),
        Spelling(
            "mlx",
            "0.32.4",
            mask="True = attend",
            note="softmax in float32 whatever the precision",
            alignment="last",
            hidden_row="mean of v",
            tested=SEEN,
            date=DATE,
        ),
        Spelling(
            "onnx.Attention",
            "opset 25, onnx 1.23.2",
            window_keys=1,
            mask="True = attend",
            note="asked of the reference evaluator; windows came with opset 25, "
            "left_window_size=w; torch's export of a hidden row gives the mean of v at opset 20 "
            "and 0 at 23",
            alignment="first",
            hidden_row="0",
            tested=WITH_WINDOW,
            date=DATE,
        ),
        Spelling(
            "onnx.LinearAttention",
            "opset 27, onnx 1.23.2",
            "batch length (heads width)",
            decay="natural logarithm",
            state="width value_dim",
            tested=("layout", "decay", "state"),
            date=DATE,
        ),
        Spelling(
            "onnxruntime.GroupQueryAttention",
            "1.32.0",
            "batch length (heads width)",
            window_keys=0,
            note="local_window_size=w",
            tested=("layout", "window_keys"),
            date=DATE,
        ),
        Spelling(
            "local-attention",
            "1.11.2",
            window_keys=1,
            mask="True = attend",
            note="with exact_windowsize=True; without it a window of whole blocks",
            tested=("layout", "window_keys", "mask"),
            date=DATE,
        ),
        Spelling(
            "x-transformers",
            "2.31.10",
            mask="True = attend",
            note="query heads h and h + kv_heads share a key head, where elsewhere neighbours do",
            alignment="last",
            hidden_row="0",
            tested=SEEN,
            date=DATE,
        ),
    )
}
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
