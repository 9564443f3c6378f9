"""The inverse of 1 + N for matrices N below the diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.eager import is_recorded

#: The size of blocks on the diagonal that a solver inverts: it takes four times as long for one of
#: 32 as for two of 16.
SOLVED = 16


def unit_inverse(below: Tensor) -> Tensor:
    """(1 + N)⁻¹, lower triangular with ones on the diagonal.

    below: N, (..., size, size), 0 on and above the diagonal; size is a power of 2
    """
    compiles = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if not compiles and (is_recorded() or below.is_meta):
        return by_halves(below, below.new_ones(*below.shape[:-1], 1, 1))
    blocks = on_diagonal(below, min(SOLVED, below.shape[-1]))
    identity = torch.eye(blocks.shape[-1], dtype=below.dtype, device=below.device)
    found = torch.linalg.solve_triangular(
        blocks, identity.expand(blocks.shape), upper=False, unitriangular=True, left=False
    )
    return by_halves(below, found)


def on_diagonal(x: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal of x, (..., blocks, size, size)."""
    return x.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).diagonal(0, -4, -2).movedim(-1, -3)


def by_halves(below: Tensor, found: Tensor) -> Tensor:
    """As `unit_inverse`, in products that every graph and counter knows: of blocks on the diagonal
    that double their size.

        [1 + N₁     0   ]⁻¹     [     (1 + N₁)⁻¹              0     ]
        [  B      1 + N₂]    =  [-(1 + N₂)⁻¹ B (1 + N₁)⁻¹  (1 + N₂)⁻¹]

    found: the inverses of the first blocks, (..., blocks, size, size)
    """
    while found.shape[-3] > 1:
        half = found.shape[-1]
        first, second = found[..., 0::2, :, :], found[..., 1::2, :, :]
        between = on_diagonal(below, 2 * half)[..., half:, :half]
        corner = -(second @ (between @ first))
        zeros = torch.zeros_like(corner)
        found = torch.cat([torch.cat([first, zeros], -1), torch.cat([corner, second], -1)], -2)
    return found[..., 0, :, :]
