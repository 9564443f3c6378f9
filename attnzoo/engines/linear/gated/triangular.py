"""The inverse of 1 + N for matrices N below the diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.eager import is_recorded


def unit_inverse(below: Tensor) -> Tensor:
    """(1 + N)⁻¹, lower triangular with ones on the diagonal.

    below: N, (..., size, size), 0 on and above the diagonal; size is a power of 2
    """
    compiles = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if compiles or not (is_recorded() or below.is_meta):
        identity = torch.eye(below.shape[-1], dtype=below.dtype, device=below.device)
        return torch.linalg.solve_triangular(
            below, identity.expand(below.shape), upper=False, unitriangular=True
        )
    return by_halves(below)


def by_halves(below: Tensor) -> Tensor:
    """As `unit_inverse`, in products that every graph and counter knows: of blocks on the diagonal
    that double their size.

        [1 + N₁     0   ]⁻¹     [     (1 + N₁)⁻¹              0     ]
        [  B      1 + N₂]    =  [-(1 + N₂)⁻¹ B (1 + N₁)⁻¹  (1 + N₂)⁻¹]
    """
    size = below.shape[-1]
    found, half = below.new_ones(*below.shape[:-2], size, 1, 1), 1
    while half < size:
        first, second = found[..., 0::2, :, :], found[..., 1::2, :, :]
        blocks = below.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))
        between = blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        corner = -(second @ (between @ first))
        zeros = torch.zeros_like(corner)
        found = torch.cat([torch.cat([first, zeros], -1), torch.cat([corner, second], -1)], -2)
        half *= 2
    return found[..., 0, :, :]
