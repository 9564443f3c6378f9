"""How many layers it takes until every token has seen every other: the longest path in the graph of
A's support.

A layer carries token j to token i where A_ij is not 0, or where i = j (the residual stream). Heads
are joined, since the output projection mixes them. A causal attention connects pairs j ≤ i only, so
only those count.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from attnzoo.attention import Attention
from attnzoo.engines.linear.linear import Linear
from attnzoo.engines.softmax.softmax import Softmax
from attnzoo.engines.sparse.patterns.block_patterns import BlockPattern
from attnzoo.engines.sparse.patterns.grid import Grid
from attnzoo.engines.sparse.patterns.pattern import Pattern
from attnzoo.engines.sparse.patterns.window import Window
from attnzoo.engines.sparse.sparse import Sparse

MOST_BLOCKS = 1024  # that the search over blocks takes on


def support(attention: Attention, n: int, is_causal: bool) -> Tensor:
    """Where A is not 0 in some head, (n, n) bool: A itself, on random queries and keys."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        q, k = (
            torch.randn(1, attention.heads, n, attention.head_dim, generator=generator)
            for _ in "qk"
        )
        return (attention.weights(q, k, is_causal=is_causal) != 0).any(1)[0]


def longest_path(adjacent: Tensor, is_causal: bool) -> int | None:
    """Breadth-first search from every token at once: the fewest layers after which every pair is
    connected, None when some never is.

    adjacent: (n, n) bool, adjacent[i, j] = one layer carries j to i. The search doubles its steps,
    then takes back what was too many.
    """
    n = adjacent.shape[0]
    step = (adjacent | torch.eye(n, dtype=torch.bool)).float()
    wanted = torch.ones(n, n, dtype=torch.bool)
    wanted = wanted.tril() if is_causal else wanted
    powers = [step]  # powers[p] reaches as far as 2^p layers
    while not _covers(powers[-1], wanted):
        if 2 ** len(powers) >= 2 * n:
            return None
        powers.append(_joined(powers[-1], powers[-1]))
    taken, reached = 0, torch.eye(n)
    # The most layers that still do not connect every pair.
    for power in range(len(powers) - 1, -1, -1):
        further = _joined(reached, powers[power])
        if not _covers(further, wanted):
            taken, reached = taken + 2**power, further
    return taken + 1 if n > 1 else 0


def known_path(attention: Attention, n: int, is_causal: bool) -> int | None:
    """The longest path from what is known of the variant's engine, for lengths that `support`
    cannot hold; None when nothing is known.

    A without a pattern is dense: one layer. A window needs ⌈(n-1)/(window-1)⌉ layers. Blocks are
    searched as blocks.
    """
    engine = attention.engine
    if attention.spec.data_dependent:
        return None
    if isinstance(engine, Sparse):
        return _pattern_path(engine.pattern, Grid(attention.heads, n, n, is_causal))
    return (1 if n > 1 else 0) if isinstance(engine, Softmax | Linear) else None


@singledispatch
def _pattern_path(pattern: Pattern, grid: Grid) -> int | None:
    return None


@_pattern_path.register
def _(pattern: Window, grid: Grid) -> int | None:
    farthest = grid.key_length - 1
    if set(pattern.dilations) != {1} or pattern.sinks:
        return None
    if pattern.window == 1:
        return 0 if farthest == 0 else None
    return -(-farthest // (pattern.window - 1))


@_pattern_path.register
def _(pattern: BlockPattern, grid: Grid) -> int | None:
    count = grid.num_key_blocks(pattern.block_size)
    if count > MOST_BLOCKS:
        return None
    adjacent = pattern.seen_blocks(grid).any(0)
    if grid.is_causal:
        adjacent = adjacent.tril()
    # Tokens of one block do not see each other directly, so blocks are too coarse.
    if not adjacent.diagonal().all():
        return None
    path = longest_path(adjacent, grid.is_causal)
    return path if path is None or grid.key_length == 1 else max(1, path)


def _joined(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second > 0).float()


def _covers(reached: Tensor, wanted: Tensor) -> bool:
    return bool((reached.bool() | ~wanted).all())
