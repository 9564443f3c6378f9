"""The loss that trains an indexer: how far its scores are from what attention reads."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnzoo.arguments import check_scale
from attnzoo.call_checks import FLOATING, INTEGERS
from attnzoo.engines.engine import accumulation_dtype

SCORES = 2**24  # of attention, held at a time


def index_loss(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    w_index: Tensor,
    *,
    selected: Tensor | None = None,
    key_mask: Tensor | None = None,
    segments: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Mean over the rows of KL(p_t ‖ softmax(I_t)), where p_t is exact attention's row summed over
    its heads and divided by its sum, and I_t are the index scores (DeepSeek-AI 2025, DeepSeek-V3.2,
    section 2.1.1, equations 3 and 4).

    q: (batch, heads, query_length, head_dim)
    k: (batch, kv_heads, key_length, head_dim)
    q_index: (batch, index_heads, query_length, index_dim)
    k_index: (batch, index_key_heads, key_length, index_dim), which divide index_heads
    w_index: (batch, index_heads, query_length)
    selected: (batch, query_length, key_length) bool, the keys over which both softmaxes run, as in
        sparse training; None: all that a row may see, as in the warm-up
    key_mask: (batch, key_length) bool, True for real keys
    segments: (batch, key_length) integer, the piece of a packed row that every token belongs to:
        rows see keys of their own piece
    is_causal: whether row i sees keys up to key_length - query_length + i
    scale: factor of the scores of attention, 1/sqrt(head_dim) by default
    returns: a number, differentiable to the index inputs and not to q and k: attention is the
        teacher. Rows that see nothing, and those of padded tokens where row i is the token
        key_length - query_length + i (causal, packed, or as many queries as keys), do not count.
        Memory is linear in the length
    raises: ValueError on a scale that is no finite number, on other dtypes, on lengths and batch
        sizes that do not agree, and on segments with more queries than keys
    """
    check_scale(scale)
    if not isinstance(is_causal, bool):
        raise ValueError(f"is_causal={is_causal!r} is a {type(is_causal).__name__}; give a bool")
    _check(q, k, q_index, k_index, w_index, selected, key_mask, segments)
    q, k = q.detach(), k.detach()
    length, pairs = q.shape[2], q.shape[0] * q.shape[1] * k.shape[2]
    of_rows = partial(
        _sum_of_rows,
        q,
        k,
        selected,
        key_mask,
        segments,
        is_causal,
        q.shape[3] ** -0.5 if scale is None else scale,
    )
    total = torch.zeros((), dtype=accumulation_dtype(q.dtype), device=q.device)
    count, together = 0, max(1, min(length, SCORES // max(1, pairs)))
    for start in range(0, length, together):
        some = slice(start, min(start + together, length))
        inputs = (q_index, k_index, w_index)
        more, rows = checkpoint(of_rows, some, *inputs, use_reentrant=False)  # pyright: ignore
        total, count = total + more, count + rows
    return total / torch.as_tensor(count, device=q.device).clamp(min=1)


def _sum_of_rows(
    q: Tensor,
    k: Tensor,
    selected: Tensor | None,
    key_mask: Tensor | None,
    segments: Tensor | None,
    is_causal: bool,
    scale: float,
    some: slice,
    q_index: Tensor,
    k_index: Tensor,
    w_index: Tensor,
) -> tuple[Tensor, Tensor]:
    """The sum of some rows' divergences, and how many rows count."""
    dtype, offset = accumulation_dtype(q.dtype), k.shape[2] - q.shape[2]
    seen = torch.ones(1, some.stop - some.start, k.shape[2], dtype=torch.bool, device=q.device)
    if is_causal:
        seen = seen.tril(offset + some.start)
    if key_mask is not None:
        seen = seen & key_mask[:, None]
    if selected is not None:
        seen = seen & selected[:, some]
    tokens = slice(offset + some.start, offset + some.stop)  # of the rows, among the keys
    if segments is not None:
        seen = seen & (segments[:, tokens, None] == segments[:, None])
    rows = seen.any(-1)
    of_tokens = is_causal or segments is not None or offset == 0
    if key_mask is not None and of_tokens:
        rows = rows & _at(key_mask, tokens)
    hidden = ~(seen & rows[..., None])
    # What does not count is cleared: a NaN in it would reach gradients through products with 0.
    if key_mask is not None:
        k_index = k_index.masked_fill(~key_mask[:, None, :, None], 0.0)
    q_index = q_index[:, :, some].masked_fill(~rows[:, None, :, None], 0.0)
    w_index = w_index[:, :, some].masked_fill(~rows[:, None], 0.0)

    def log_softmax(scores: Tensor) -> Tensor:
        """0 in rows that do not count, and -inf nowhere, so that no gradient is NaN."""
        return scores.masked_fill(hidden, torch.finfo(dtype).min).log_softmax(-1)

    queries = q[:, :, some].to(dtype).unflatten(1, (k.shape[1], -1))
    scores = (queries @ k[:, :, None].to(dtype).mT).flatten(1, 2) * scale
    teacher = scores.masked_fill(hidden[:, None], torch.finfo(dtype).min).softmax(-1).mean(1)
    of_index = q_index.to(dtype).unflatten(1, (k_index.shape[1], -1))
    products = (of_index @ k_index[:, :, None].to(dtype).mT).flatten(1, 2).relu()
    student = log_softmax((products * w_index[..., None].to(dtype)).sum(1))
    teacher = teacher.masked_fill(hidden, 0.0)
    divergence = torch.xlogy(teacher, teacher) - teacher * student.masked_fill(hidden, 0.0)
    rows = rows.expand(q.shape[0], -1)
    return divergence.sum(), rows.sum()


def _at(mask: Tensor, tokens: slice) -> Tensor:
    """The mask of some tokens; False for those before the first."""
    before = min(max(0, -tokens.start), tokens.stop - tokens.start)
    return F.pad(mask[:, max(0, tokens.start) : max(0, tokens.stop)], (before, 0))


def _check(
    q: Tensor,
    k: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    w_index: Tensor,
    selected: Tensor | None,
    key_mask: Tensor | None,
    segments: Tensor | None,
) -> None:
    """Raise a ValueError, one sentence, where sizes do not agree."""
    dimensions = {"q": (q, 4), "k": (k, 4), "q_index": (q_index, 4), "k_index": (k_index, 4)}
    for name, (x, wanted) in {**dimensions, "w_index": (w_index, 3)}.items():
        if not isinstance(x, Tensor) or x.dim() != wanted or x.dtype not in FLOATING:
            found = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x)
            raise ValueError(f"{name} is {found}; give a floating tensor of {wanted} dimensions")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads, which do not divide the {q.shape[1]} of q")
    batch, heads, queries, keys = q.shape[0], q_index.shape[1], q.shape[2], k.shape[2]
    wanted = {
        "k": (k, (batch, k.shape[1], keys, q.shape[3])),
        "q_index": (q_index, (batch, heads, queries, q_index.shape[3])),
        "k_index": (k_index, (batch, k_index.shape[1], keys, q_index.shape[3])),
        "w_index": (w_index, (batch, heads, queries)),
        "selected": (selected, (batch, queries, keys)),
        "key_mask": (key_mask, (batch, keys)),
        "segments": (segments, (batch, keys)),
    }
    for name, (found, shape) in wanted.items():
        if found is not None and tuple(found.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(found.shape)}; with q of {tuple(q.shape)} and k of "
                f"{tuple(k.shape)} it must be {shape}"
            )
    for name, x, dtypes in (
        ("selected", selected, (torch.bool,)),
        ("key_mask", key_mask, (torch.bool,)),
        ("segments", segments, INTEGERS),
    ):
        if x is not None and x.dtype not in dtypes:
            raise ValueError(f"{name} has dtype {x.dtype}; it must be {dtypes[0]}")
    if heads % k_index.shape[1]:
        raise ValueError(
            f"k_index has {k_index.shape[1]} heads, which do not divide the {heads} of q_index"
        )
    if segments is not None and queries > keys:
        raise ValueError(
            f"segments has the pieces of {keys} keys and there are {queries} queries, more than "
            "have a piece; give as many queries as keys, or fewer"
        )
