"""What the oracles share: loops over samples and heads, and rows that hold weights at the keys they
see.

Every oracle takes q, k, v, the masks, segments, and as keyword arguments the variant's options and
what it learned or drew, and returns (out, A): out is (batch, heads, query_length, value_dim), A is
(batch, heads, query_length, key_length). All are differentiable. Query i stands at position
key_length - query_length + i; a row that sees nothing is 0. segments, (batch, key_length) integer,
tells which piece of a packed row a token belongs to: every piece is asked about alone.

With output_final_state=True a recurrence, or what can be written as one, returns (out, A, state),
the state after the last token, of its piece in a packed row: S, (batch, kv_heads, width,
value_dim), as the recurrence of its paper has it, without the factor of the scores. Where rows are
normalised it is Σ_j φ(k_j) [v_j, 1]ᵀ, whose last column makes the normaliser. All others have to
carry the keys and values themselves, and raise ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Oracle = Callable[..., tuple[Tensor, ...]]
ORACLES: dict[str, Oracle] = {}
HeadMatrix = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def oracle(name: str) -> Callable[[Oracle], Oracle]:
    """Enter a function, which returns (out, A) or (out, A, state), into `ORACLES` under the name of
    the variant it specifies, and let it take `segments` and `output_final_state`."""

    def enter(function: Oracle) -> Oracle:
        @wraps(function)
        def of_packed(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            *,
            segments: Tensor | None = None,
            output_final_state: bool = False,
            **given: Any,
        ) -> tuple[Tensor, ...]:
            if 0 in (*q.shape[:3], k.shape[2]) and not output_final_state:
                return of_nothing(q, k, v)
            if segments is None:
                found = function(q, k, v, **given)
            else:
                found = by_segments(function, q, k, v, segments, given)
                if output_final_state and len(found) > 2:
                    found = (*found[:2], of_samples(found[2:]))
            if output_final_state and len(found) == 2:
                raise ValueError(
                    f"{name} is no recurrence: it has no final state but all keys and values; "
                    "leave output_final_state out"
                )
            return found if output_final_state else found[:2]

        ORACLES[name] = of_packed
        return of_packed

    return enter


def of_nothing(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out, A) without samples, queries or keys: rows of 0, whose gradients are 0."""
    zero = torch.stack([x.double().flatten()[:0].sum() for x in (q, k, v)]).sum()
    return zero.expand(*q.shape[:3], v.shape[3]), zero.expand(*q.shape[:3], k.shape[2])


def by_segments(
    function: Oracle, q: Tensor, k: Tensor, v: Tensor, segments: Tensor, given: dict[str, Any]
) -> tuple[Tensor, ...]:
    """What an oracle says of every piece of every sample, put where the tokens of the piece
    stand, and of recurrences the state of each sample, that of the piece of the last token."""
    batch, heads, query_length, _ = q.shape
    offset = k.shape[2] - query_length
    if given.get("attn_mask") is not None:
        given["attn_mask"] = given["attn_mask"].expand(batch, heads, query_length, k.shape[2])
    assert segments.shape == (batch, k.shape[2]) and not segments.is_floating_point()
    out = torch.zeros(batch, heads, query_length, v.shape[3], dtype=torch.float64)
    weights = torch.zeros(batch, heads, query_length, k.shape[2], dtype=torch.float64)
    states = []
    for b in range(batch):
        one = slice(b, b + 1)
        for piece in segments[b].unique():
            keys = [j for j in range(k.shape[2]) if segments[b, j] == piece]
            rows = [j - offset for j in keys if j >= offset]
            own = {name: _of_piece(name, x, one, rows, keys) for name, x in given.items()}
            if rows:
                found, a, *state = function(
                    q[one][:, :, rows], k[one][:, :, keys], v[one][:, :, keys], **own
                )
                out[b, :, rows] = found[0].to(out)
                weights[b, :, torch.tensor(rows)[:, None], torch.tensor(keys)] = a[0].to(weights)
                states += state if piece == segments[b, -1] else []
    return out, weights, *states


def of_samples(states: tuple[Tensor, ...]) -> Tensor:
    """The states of all samples. Raises ValueError where they have several sizes."""
    if len({x.shape for x in states}) > 1:
        raise ValueError(
            "the last pieces of the samples have states of several sizes, as trees over other "
            "lengths have; ask for the final state of one sample at a time"
        )
    return torch.cat(states)


def _of_piece(name: str, x: Any, one: slice, rows: list[int], keys: list[int]) -> Any:
    """What an argument of an oracle says of some rows and keys of one sample."""
    of_keys = ("log_decay", "beta", "removal_key", "removal_rate", "k_index")
    if x is not None and name in of_keys:
        return x[one][:, :, keys]
    gates = ("compressed_gate", "selected_gate", "window_gate")
    if x is not None and name in ("levels", "subtraction", "q_index", "w_index", *gates):
        return x[one][:, :, rows]
    if x is None or name not in ("key_mask", "attn_mask", "global_mask", "global_qkv"):
        return x
    if name == "attn_mask":
        return x[one][..., rows, :][..., keys]
    if name == "global_qkv":
        q, k, v = x
        return q[one][:, :, rows], k[one][:, :, keys], v[one][:, :, keys]
    return x[one][:, keys]


def by_heads(
    matrix: HeadMatrix, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Loop over samples and heads; `matrix(head, q, k, visible)` gives one head's A, (query_length,
    key_length)."""
    batch, heads, query_length, _ = q.shape
    kv_heads, key_length = k.shape[1], k.shape[2]
    samples, outputs = [], []
    for b in range(batch):
        visible = visible_keys(
            query_length, key_length, None if key_mask is None else key_mask[b], is_causal
        )
        real = torch.ones(key_length, dtype=torch.bool) if key_mask is None else key_mask[b]
        matrices, rows = [], []
        for h in range(heads):
            shared = h // (heads // kv_heads)
            keys = torch.where(real[:, None], k[b, shared].double(), 0.0)
            values = torch.where(real[:, None], v[b, shared].double(), 0.0)
            a = matrix(h, q[b, h].double(), keys, visible)
            matrices.append(a)
            rows.append(a @ values)
        samples.append(torch.stack(matrices))
        outputs.append(torch.stack(rows))
    return torch.stack(outputs), torch.stack(samples)


def final_state(
    features: Callable[[int, Tensor, Tensor], Tensor],
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    normalize: bool = False,
) -> Tensor:
    """Σ_j φ(k_j) v_jᵀ of every head of keys over the real keys, (batch, kv_heads, width,
    value_dim), or with normalize Σ_j φ(k_j) [v_j, 1]ᵀ.

    features: φ of a head's number, its keys, (key_length, head_dim), and which of them are real;
        (key_length, width)
    """
    states = []
    for b in range(k.shape[0]):
        real = torch.ones(k.shape[2], dtype=torch.bool) if key_mask is None else key_mask[b]
        for h in range(k.shape[1]):
            phi, values = features(h, k[b, h].double(), real), v[b, h].double()
            if normalize:
                values = torch.cat([values, torch.ones_like(values[:, :1])], 1)
            states.append(phi[real].T @ values[real])
    return torch.stack(states).unflatten(0, k.shape[:2])


def visible_keys(
    query_length: int, key_length: int, real: Tensor | None, is_causal: bool
) -> Tensor:
    """Which keys every query may see by padding and causality, (query_length, key_length) bool.

    real: (key_length,) bool, True = a real key; None: all are.
    """
    rows = []
    for i in range(query_length):
        position = key_length - query_length + i
        row = torch.ones(key_length, dtype=torch.bool) if real is None else real.clone()
        if is_causal:
            row[max(0, position + 1) :] = False
        rows.append(row)
    return torch.stack(rows)


def real_keys(visible: Tensor) -> list[int]:
    """Slots of the real keys: the last query sees them all."""
    return visible[-1].nonzero()[:, 0].tolist()


def leading_padding(visible: Tensor) -> int:
    """How many padded slots stand ahead of the first real one: positions count from there."""
    return next(iter(real_keys(visible)), 0)


def rows(visible: Tensor, weigh: Callable[[int, Tensor], Tensor]) -> Tensor:
    """A matrix whose row i holds weigh(i, seen) at the keys that the row sees, and 0 elsewhere."""
    rows = []
    for i in range(visible.shape[0]):
        row = torch.zeros(visible.shape[1], dtype=torch.float64)
        seen = visible[i].nonzero().squeeze(1)
        rows.append(row if seen.numel() == 0 else row.index_copy(0, seen, weigh(i, seen)))
    return torch.stack(rows)


def softmax(scores: Tensor) -> Tensor:
    """exp(s_j) / Σ_l exp(s_l); 0 where every score is -inf."""
    if bool((scores == -math.inf).all()):
        return torch.zeros_like(scores)
    shifted = (scores - scores.max().detach()).exp()
    return shifted / shifted.sum()


def normalised(products: Tensor) -> Tensor:
    """p_j / Σ_l p_l; 0 where the sum is exactly 0."""
    total = products.sum()
    return torch.zeros_like(products) if total.item() == 0.0 else products / total


def of_distance(bias: Tensor, distance: Tensor) -> Tensor:
    """What a bias of a head, (2 · reach + 1,), adds at distances from -reach to reach. Raises
    ValueError on others."""
    reach, farthest = bias.shape[0] // 2, int(distance.abs().max()) if len(distance) else 0
    if farthest > reach:
        raise ValueError(
            f"distance_bias reaches {reach} positions and a row sees a key {farthest} away; give "
            f"(heads, {2 * farthest + 1}) numbers"
        )
    return bias.double()[reach + distance]


def softmax_over(
    visible: Tensor,
    q: Tensor,
    k: Tensor,
    scale: float | None,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    by_distance: Tensor | None = None,
    one_more: Tensor | None = None,
) -> Tensor:
    """A of one head: softmax(cap(scale · q_i·k_j) + bias_ij + by_distance[reach + j - i]) over the
    keys that row i sees, (query_length, key_length).

    visible: (query_length, key_length) bool. scale: None is 1/sqrt(head_dim). bias: (query_length,
    key_length), added to the scores. softcap: c in cap(s) = c · tanh(s / c); None: cap(s) = s.
    by_distance: (2 · reach + 1,). one_more: a score of every row, exponentiated in its denominator
    alone.
    """
    factor = q.shape[1] ** -0.5 if scale is None else scale

    def weigh(i: int, seen: Tensor) -> Tensor:
        scores = factor * (k[seen] @ q[i])
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[i, seen]
        if by_distance is not None:
            scores = scores + of_distance(by_distance, seen - (k.shape[0] - q.shape[0] + i))
        if one_more is not None:
            return softmax(torch.cat([scores, one_more.double()[None]]))[:-1]
        return softmax(scores)

    return rows(visible, weigh)
