"""BigBird: a window, a few global blocks, and a few random ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.attention import Attention, Spec
from attnzoo.engines.softmax.distance_bias import DISTANCE_BIAS
from attnzoo.engines.sparse.blocks.block_sparse import BlockSparse
from attnzoo.engines.sparse.patterns.block_patterns import BlockUnion, GlobalBlocks, WindowBlocks
from attnzoo.engines.sparse.patterns.grid import Grid, padded
from attnzoo.registry import register
from attnzoo.variants.bigbird.random_blocks import RandomBlocks


@register
class BigBird(Attention):
    """BigBird, internal transformer construction (Zaheer et al. 2020, section 2 and appendix D).

        A_ij = exp(s_ij) / Σ_{l ∈ S(i)} exp(s_il) if j ∈ S(i), else 0, S = window ∪ global ∪ random

    A query block sees its window, the global blocks, and random blocks of its own, per head; global
    blocks see everything, so any two tokens are two steps apart. Cost n·(w + g + r) instead of n².
    What is kept is softmax itself, on S; what lies outside S is lost in one layer. S is a set: a
    block counts once, and on a short input a row simply sees everything. In the causal form (ours)
    globals are the first blocks and random ones are earlier ones, so that no row changes as the
    sequence grows. Use it for long documents of which the beginning says much, in place of exact
    attention that was trained; not where one row must read one far token directly.

    block_size: number of positions in a block
    num_random_blocks: r, random blocks for each query block and head, besides the other two kinds
    num_window_blocks: w, an odd number: the query's own block and half of the others on each side
    num_global_blocks: g: the first ⌈g/2⌉ and the last ⌊g/2⌋ blocks, or in a causal call the first g
    seed: chooses the random blocks and is kept in state_dict; give each layer its own
    scale: factor of the scores, 1/sqrt(head_dim) by default
    dropout: probability that an entry of A is dropped, in training only
    softcap: keeps scores within ±softcap, see `standard`
    """

    spec = Spec(
        name="bigbird",
        title="BigBird",
        paper="Zaheer et al., Big Bird: Transformers for Longer Sequences, 2020, arXiv:2007.14062",
        equation="A_ij = exp(q_i·k_j/√d) / Σ_{l∈S(i)} exp(q_i·k_l/√d), "
        "j ∈ S(i) = window ∪ global ∪ random",
        complexity="O(n·(w+g+r)) time, O(n) memory",
        family="sparse",
        exact=True,
        dropout=True,
        inputs=(DISTANCE_BIAS,),
    )
    engine: BlockSparse

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        block_size: int = 64,
        num_random_blocks: int = 3,
        num_window_blocks: int = 3,
        num_global_blocks: int = 2,
        seed: int = 0,
        scale: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        backend: str = "auto",
    ) -> None:
        near = BlockUnion(
            WindowBlocks(num_window_blocks, block_size), GlobalBlocks(num_global_blocks, block_size)
        )
        self.random = RandomBlocks(num_random_blocks, block_size, seed, near)
        super().__init__(
            heads,
            head_dim,
            BlockSparse(BlockUnion(near, self.random), scale, dropout, softcap=softcap),
            backend=backend,
        )

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.random.seed, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self._draw(replace(self.random, seed=int(state)))

    def keep_heads(self, first: int, count: int) -> None:
        super().keep_heads(first, count)
        self._draw(replace(self.random, first_head=self.random.first_head + first))

    def _draw(self, random: RandomBlocks) -> None:
        self.random = random
        self.engine.pattern = BlockUnion(random.outside, random)

    def oracle_arguments(self, queries: int, keys: int, is_causal: bool) -> dict[str, Any]:
        return {
            "random_blocks": lambda real: self.random_blocks(queries, keys, is_causal, real[None])[
                0
            ]
        }

    def random_blocks(
        self, query_length: int, key_length: int, is_causal: bool, key_mask: Tensor | None = None
    ) -> Tensor:
        """The random key blocks of every query block, -1 where there are no more.

        key_mask: (batch, key_length) bool, True = real; blocks count from the first real key of a
            sample

        Returns (heads, query_blocks, num_random_blocks), or with a key_mask (batch, heads,
        query_blocks, num_random_blocks), whose query blocks are those of all samples together.
        """
        grid = Grid(self.heads, query_length, key_length, is_causal)
        return self.random.key_blocks(grid if key_mask is None else padded(grid, key_mask))
