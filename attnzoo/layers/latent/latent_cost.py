"""What latent attention costs, in both forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attnzoo.engines.engine import Cost, Shape


def cost_of(core: Any, shape: Shape) -> Cost:
    """The cost of a `LatentCore`'s call: the engine's on keys of the form that it takes, what makes
    these, and a state of one latent and one turned key a token.

    shape: the sizes of the call, of heads as wide as q's
    """
    form = core.form_of(shape.query_length, shape.key_length)
    shared = replace(shape, kv_heads=1, head_dim=core.kept_width)
    width = max(core.head_dim, core.value_dim)
    inner = shared if form == "absorbed" else replace(shape, kv_heads=core.heads, head_dim=width)
    cost = core.core.engine.cost(inner)
    tokens = shape.query_length if form == "absorbed" else shape.key_length
    both = core.rank * (core.key_dim + core.value_dim)
    made = shape.batch_size * core.heads * tokens * both
    # Of a cache of keys and values, the keys alone are kept; another state is the engine's own.
    state = core.core.engine.cost(shared if core.absorbs else inner)
    share = 2 if core.absorbs else 1
    weights = core.heads * both
    queries = shape.batch_size * core.heads * shape.query_length * (core.head_dim + core.value_dim)
    moved = queries + shape.batch_size * shape.key_length * core.kept_width + weights
    return replace(
        cost,
        macs=cost.macs + made,
        support_macs=cost.support_macs + made,
        moved_bytes=moved * shape.dtype.itemsize,
        state_elements=state.state_elements // share,
        state_bytes=state.state_bytes // share,
        state_growth=state.state_growth // share,
    )
