"""Where a packed row's pieces end inside the chunks of causal linear attention: what stands in
another piece is worth 0."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.engines.linear.decay import Worth


def of_chunks(ids: Tensor, last_id: Tensor | None, group: int, dtype: torch.dtype) -> Worth:
    """Factors of chunks, each of which hands on the sums of its last piece alone.

    ids: (batch, chunks, length), of rows whose pieces stand together
    last_id: (batch,), of the token before the first chunk; None where nothing stands before
    group: rows that share a key
    dtype: of sums
    """
    relative = (ids[..., :, None] == ids[..., None, :]).tril()
    last = ids[..., -1]
    weights, carry, shrink = ids == last[..., None], None, None
    if last_id is not None:
        before = torch.cat([last_id[:, None], last[:, :-1]], 1)
        carry = (ids == before[..., None]).repeat(1, 1, group)[..., None]
        shrink = before == last
    of_heads = (
        None if x is None else x[:, None].to(dtype) for x in (relative, carry, weights, shrink)
    )
    return Worth(*of_heads)
