"""Products of Householder-like matrices H_t = I − β_t w_t w_tᵀ, through chunks of tokens.

What a chunk does is one triangular inverse (the UT transform): with N = (β W Wᵀ) below the diagonal
and T = (1 + N)⁻¹, what token l takes off a key k_j of the chunk is c_lj = [T (β W Kᵀ)_below]_lj, so
that for tokens i ≥ j of the chunk, and for whole chunks,

    q_iᵀ H_i … H_{j+1} k_j   = q_i·k_j − Σ_{l≤i} (q_i·w_l) c_lj
    q_iᵀ H_i … H_first       = q_iᵀ − Σ_{l≤i} (q_i·w_l) (T β W)_l
    H_last … H_{j+1} k_j     = k_j − Σ_l c_lj w_l
    H_last … H_first         = I − Wᵀ (T β W)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.engines.linear.gated.triangular import unit_inverse

CHUNK = 64


class Tokens(NamedTuple):
    """Tokens in chunks, (batch, kv_heads, chunks, length, ...).

    stronger: β W. inverse: T, (..., length, length)
    """

    k: Tensor
    w: Tensor
    stronger: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, k: Tensor, w: Tensor, beta: Tensor) -> Tokens:
        """k, w: (batch, kv_heads, length, width); beta: (batch, kv_heads, length). The last chunk
        is filled up with zeros."""
        k, w = (cut(x) for x in (k, w))
        stronger = w * cut(beta[..., None])
        return cls(k, w, stronger, unit_inverse((stronger @ w.mT).tril(-1)))

    def some(self, which: slice) -> Tokens:
        """Some of the chunks."""
        return Tokens(*(x[:, :, which] for x in self))

    def taken(self) -> Tensor:
        """c, what each token takes off each earlier key, (..., length, length)."""
        return self.inverse @ (self.stronger @ self.k.mT).tril(-1)


class Chunks(NamedTuple):
    """What rows of chunks are made of; `group` query heads read a key head.

    products: of the queries of a chunk with its keys, (batch, kv_heads, group, chunks, length,
        length); no meaning above the diagonal
    queries: turned to before their chunk, (batch, kv_heads, group, chunks, length, width), of those
        chunks that something stands before
    keys: turned to behind their chunk, (batch, kv_heads, chunks, length, width), of all but the
        last chunk
    turns: H_last … H_first, (batch, kv_heads, chunks, width, width), of those chunks that have
        others on both sides
    """

    products: Tensor
    queries: Tensor
    keys: Tensor
    turns: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, w: Tensor, beta: Tensor, begins: bool) -> Chunks:
        """q: (batch, heads, length, width), a query for every token. k, w, beta: as `Tokens.of`
        takes them. begins: whether nothing stands before them."""
        tokens = Tokens.of(k, w, beta)
        q = cut(q).unflatten(1, (k.shape[1], -1))
        taken, seen = tokens.taken(), (q @ tokens.w.mT[:, :, None]).tril()
        products = q @ tokens.k.mT[:, :, None] - seen @ taken[:, :, None]
        first, behind = int(begins), tokens.some(slice(int(begins), None))
        turned = behind.inverse @ behind.stronger
        queries = q[:, :, :, first:] - seen[:, :, :, first:] @ turned[:, :, None]
        before = tokens.some(slice(None, -1))
        keys = before.k - taken[:, :, :-1].mT @ before.w
        return cls(products, queries, keys, identity_less(behind.w[:, :, :-1], turned[:, :, :-1]))


def cut(x: Tensor) -> Tensor:
    """(batch, heads, length, width) -> (batch, heads, chunks, length, width), filled up."""
    size = chunk_of(int(x.shape[2]))
    return F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))


def chunk_of(length: int) -> int:
    """Tokens of a chunk of so many: a power of 2."""
    return min(CHUNK, 1 << (length - 1).bit_length())


def identity_less(w: Tensor, turned: Tensor) -> Tensor:
    """I − Wᵀ (T β W) of chunks."""
    return torch.eye(w.shape[-1], dtype=w.dtype, device=w.device) - w.mT @ turned


def turned_keys(k: Tensor, w: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Keys turned to behind the last token, (batch, kv_heads, length, width), and H_last … H_first,
    (batch, kv_heads, width, width). k, w, beta: as `Tokens.of` takes them, of a token at least."""
    tokens = Tokens.of(k, w, beta)
    own = (tokens.k - tokens.taken().mT @ tokens.w).unbind(2)
    turns = identity_less(tokens.w, tokens.inverse @ tokens.stronger).unbind(2)
    behind = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)  # what all later chunks do
    parts = []
    for keys, turn in zip(own[::-1], turns[::-1], strict=True):
        parts.append(keys @ behind.mT)
        behind = behind @ turn
    return torch.cat(parts[::-1], 2)[:, :, : k.shape[2]], behind


def products_of_all(q: Tensor, k: Tensor, w: Tensor, beta: Tensor) -> Tensor:
    """q_iᵀ H_i … H_{j+1} k_j of all tokens as one chunk, by one solve: (batch, heads, length,
    length). q, k, w: (batch, heads, length, width); beta: (batch, heads, length)."""
    stronger = w * beta[..., None]
    taken = torch.linalg.solve_triangular(
        (stronger @ w.mT).tril(-1), (stronger @ k.mT).tril(-1), upper=False, unitriangular=True
    )
    return q @ k.mT - (q @ w.mT).tril() @ taken
