"""Gates and delta rules in chunks of tokens, many of which are computed side by side.

Behind a chunk the state is an affine function of the state before it, and so are the chunk's rows:

    rows = fresh rows + reads · S,    S' = fresh state + transition · S

All of these but S are products inside the chunks; a short loop then hands the state from one chunk
to the next (Yang et al. 2024, arXiv:2406.06484, section 3.2, and 2412.06464, section 3.3: the WY
form). Written in operators that autograd, a compiler and a counter of operations can follow.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.linear.chunks import CAUSAL_CHUNK, HELD
from attnzoo.engines.linear.gated.fading import fading_of
from attnzoo.engines.linear.gated.tokens import Rule
from attnzoo.engines.linear.gated.triangular import unit_inverse
from attnzoo.engines.linear.layout import grouped, ungrouped
from attnzoo.engines.piece_by_piece import at_a_time


def chunk_of(length: int) -> int:
    """Tokens of a chunk: a power of 2, for the halves of halves."""
    chunk = 1
    while chunk < length and chunk < CAUSAL_CHUNK:
        chunk *= 2
    return chunk


def spans(call: Call) -> list[int]:
    """How many tokens are computed side by side, in order: whole chunks, but for the last."""
    length, chunk = call.key_length, chunk_of(call.key_length)
    width = max(call.k.shape[3], call.v.shape[3], chunk) * (call.group + 2)
    numbers = call.k.shape[0] * call.k.shape[1] * chunk * width
    chunks = len(range(0, length, chunk))
    tokens = chunk * at_a_time(chunks, numbers, HELD, call.k)
    return [min(tokens, length - start) for start in range(0, length, tokens)]


def scan(
    rule: Rule, call: Call, state: Tensor | None, *, remember_last: bool = False
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Some rows at a time, (batch, heads, tokens, value_dim), and the state after them.

    call: as `tokens.prepared` makes it, with as many queries as keys
    state: (batch, kv_heads, width, value_dim), before the call; None: all 0
    remember_last: whether the state after the last rows is wanted, as decoding wants it
    """
    lengths = spans(call)
    chunk = chunk_of(call.key_length)
    if state is None:
        state = call.k.new_zeros(*call.k.shape[:2], call.k.shape[3], call.v.shape[3])
    for place, span in enumerate(call.split(queries=lengths, keys=lengths)):
        assert state is not None
        remember = remember_last or place < len(lengths) - 1
        rows, state = attend(rule, span, state, chunk, remember)
        yield rows, state


def attend(
    rule: Rule, call: Call, state: Tensor, chunk: int, remember: bool
) -> tuple[Tensor, Tensor | None]:
    """The rows of chunks that are computed side by side, and the state after them.

    call: as `tokens.prepared` makes it, with as many queries as keys
    state: before the call
    chunk: tokens of a chunk; the last one is filled up with tokens that change nothing
    remember: whether the state after them is wanted; None is returned where it is not
    """
    length, kv_heads, group = call.key_length, call.k.shape[1], call.group
    chunks = len(range(0, length, chunk))
    missing = chunks * chunk - length
    q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (call.q, call.k, call.v))
    q = grouped(q, kv_heads, chunks).unflatten(3, (group, chunk))
    k, v = (x.unflatten(2, (chunks, chunk)) for x in (k, v))
    log_decay, beta = (_chunked(call.get(name), chunks, chunk) for name in ("log_decay", "beta"))
    fading = fading_of(log_decay, k)
    if rule.delta:
        scores, overlaps = fading.products(torch.cat([q, k[..., None, :, :]], 3), k).split(
            [group, 1], 3
        )
        overlaps = overlaps[:, :, :, 0].tril(-1)
        writes = torch.cat([v, fading.carried(k[..., None, :, :])[:, :, :, 0]], -1)
        if beta is not None:
            overlaps, writes = overlaps * beta[..., None], writes * beta[..., None]
        fresh, erased = (unit_inverse(overlaps) @ writes).split([v.shape[-1], k.shape[-1]], -1)
    else:
        scores, fresh, erased = fading.products(q, k), v, None
    scores, reads = scores.flatten(3, 4), fading.carried(q).flatten(3, 4)
    if erased is not None:
        reads = reads - scores @ erased
    if chunks == 1 and not remember:
        before, after = state[:, :, None], None
    else:
        handed_on = fading.handed_on(k).mT
        transition = None if erased is None else -(handed_on @ erased)
        before, after = _states(state, handed_on @ fresh, fading.kept, transition, remember)
    rows = ungrouped(scores @ fresh + reads @ before, group)
    return rows[:, :, :length], after


def _chunked(x: Tensor | None, chunks: int, chunk: int) -> Tensor | None:
    """A gate, (batch, kv_heads, length, ...), in chunks, 0 where these have no tokens."""
    if x is None:
        return None
    filled = F.pad(x, (0, 0) * (x.dim() - 3) + (0, chunks * chunk - x.shape[2]))
    return filled.unflatten(2, (chunks, chunk))


def _states(
    state: Tensor, fresh: Tensor, kept: Tensor | None, transition: Tensor | None, remember: bool
) -> tuple[Tensor, Tensor | None]:
    """The states before each chunk, (batch, kv_heads, chunks, width, value_dim), and the last one.

    state: before the first chunk, (batch, kv_heads, width, value_dim)
    fresh: (batch, kv_heads, chunks, width, value_dim), what each chunk adds
    kept: (batch, kv_heads, chunks, width or 1, 1), what it multiplies the state by; None: 1
    transition: (batch, kv_heads, chunks, width, width), by what it mixes the state's rows besides
    remember: whether the last one is wanted, behind all chunks
    """
    before = [state]
    for place, more in enumerate(fresh.unbind(2)):
        if place == fresh.shape[2] - 1 and not remember:
            return torch.stack(before, 2), None
        faded = state if kept is None else state * kept[:, :, place]
        mixed = faded if transition is None else faded + transition[:, :, place] @ state
        state = mixed + more
        before.append(state)
    return torch.stack(before[:-1], 2), state
