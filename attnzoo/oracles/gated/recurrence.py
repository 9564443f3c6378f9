"""What the oracles of recurrent attention share: a state that is told one token after another.

The state S of a head is (head_dim, n); row t of A·v is scale · S_tᵀ q_t, where S_t has taken token
t already. Since A·v is linear in v, the recurrence is run with the identity as values, n being the
number of keys, and A itself stands in the rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: The state after a token: of the state before, (batch, heads, head_dim, n), the token's number t
#: and its value, (n,).
Advance = Callable[[Tensor, int, Tensor], Tensor]


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, advance: Advance
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, A, state) of a recurrence over the tokens. A padded token leaves the state as it is."""
    batch, heads, query_length, head_dim = q.shape
    length = k.shape[2]
    values = torch.eye(length, dtype=torch.float64)
    state = torch.zeros(batch, heads, head_dim, length, dtype=torch.float64)
    rows = [torch.zeros(batch, heads, length, dtype=torch.float64)] * max(0, query_length - length)
    for t in range(length):
        after = advance(state, t, values[t])
        real = torch.ones(batch) if key_mask is None else key_mask[:, t]
        state = torch.where(real[:, None, None, None] > 0, after, state)
        query = t - length + query_length
        if query >= 0:
            rows.append(scale * torch.einsum("bhd,bhdn->bhn", q[:, :, query].double(), state))
    a, of_values = torch.stack(rows, 2), of_heads(v, heads, key_mask)
    return a @ of_values, a, (state @ of_values)[:, :: heads // k.shape[1]]


def of_heads(x: Tensor, heads: int, key_mask: Tensor | None) -> Tensor:
    """A tensor (batch, kv_heads, length, ...) for every query head in float64, 0 in padding."""
    if key_mask is not None:
        real = key_mask[:, None].reshape(*key_mask.shape[:1], 1, -1, *(1,) * (x.dim() - 3))
        x = torch.where(real, x, 0.0)
    return x.double().repeat_interleave(heads // x.shape[1], 1)


def unit(x: Tensor) -> Tensor:
    """x / sqrt(|x|² + 1e-6) of the last dimension, in float64."""
    x = x.double()
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def outer(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ of every head: (batch, heads, head_dim) and (batch, heads, n) or (n,)."""
    return a[..., :, None] * b[..., None, :]


def transposed_times(state: Tensor, a: Tensor) -> Tensor:
    """Sᵀ a of every head, (batch, heads, n)."""
    return torch.einsum("bhdn,bhd->bhn", state, a)
