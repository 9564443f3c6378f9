"""A gated state from where a caller's tensor says to where it is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.attention import Attention
from attnzoo.autocast import without_autocast
from attnzoo.call import UnsupportedError
from attnzoo.conventions.watched import show
from attnzoo.engines.linear.state import LinearState
from attnzoo.engines.linear.sums import Past
from attnzoo.registry import build

_built: dict[tuple[str, int, int, bool | None], Attention] = {}


def built(name: str, heads: int, width: int, l2_norm: bool | None = None) -> Attention:
    """The attention of this name and of these sizes, the same one for every call. A compiler finds
    it where it was built before, and cannot follow how.

    l2_norm: its option, where it has one
    """
    key = (name, heads, width, l2_norm)
    if key not in _built:
        options = {} if l2_norm is None else {"l2_norm": l2_norm}
        _built[key] = build(name, heads=heads, head_dim=width, **options)
    return _built[key]


def run(
    attention: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inputs: dict[str, Tensor],
    *,
    initial_state: Tensor | None,
    output_final_state: bool,
    key_mask: Tensor | None,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The causal rows of a call, and the state after it.

    attention: a gated linear attention
    q, k, v: (batch, heads, length, ...), as many heads each
    inputs: gates, as `attention` declares them
    initial_state: (batch, heads, width, value_dim), before the first token; None: all 0
    output_final_state: whether the state is wanted
    key_mask: (batch, length) bool, False = padding, which changes no state
    segments: (batch, length) integer; the state is that of the first piece before, and of the last
        piece after
    returns: (batch, heads, length, value_dim), and as initial_state or None
    """
    show(None, lambda: _weights(attention, q, k, inputs, initial_state, key_mask, segments))
    with without_autocast(q.device):
        if initial_state is None and not output_final_state:
            rows = attention(
                q, k, v, key_mask=key_mask, segments=segments, is_causal=True, **inputs
            )
            return rows, None
        if segments is not None:
            log_decay = _closed_between(segments, inputs["log_decay"])
            inputs = {**inputs, "log_decay": log_decay}
        past = None if initial_state is None else Past(initial_state.to(q.dtype), None)
        before = LinearState(q.shape[0], attention.heads, seen=int(past is not None), past=past)
        rows, after = attention.step(q, k, v, before, key_mask=key_mask, **inputs)
    return rows, after.past.sums if output_final_state else None


def _weights(
    attention: Attention,
    q: Tensor,
    k: Tensor,
    inputs: dict[str, Tensor],
    initial_state: Tensor | None,
    key_mask: Tensor | None,
    segments: Tensor | None,
) -> Tensor:
    """A of the call. Raises UnsupportedError behind a state, which says nothing of its tokens."""
    if initial_state is not None:
        raise UnsupportedError(
            "a recurrent layer goes on from a cached state, of whose tokens no A can be formed; "
            "give the whole text in one call"
        )
    with without_autocast(q.device):
        return attention.weights(
            q, k, key_mask=key_mask, segments=segments, is_causal=True, **inputs
        )


def _closed_between(segments: Tensor, log_decay: Tensor) -> Tensor:
    """Gates that let nothing pass to the first token of a piece from the one before."""
    begins = torch.zeros_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    begins = begins[:, None] if log_decay.dim() == 3 else begins[:, None, :, None]
    return log_decay.masked_fill(begins, float("-inf"))
