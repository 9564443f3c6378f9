"""What transformers' caches hold of multi-head latent attention: the latents as `keys` and the
rotary keys as `values`, (batch, 1, length, ...) each. Here one vector, [k^R, c], has both."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from attnzoo.arguments import check_choice

#: The order of a turned key whose pairs are neighbours in the weights: DeepSeek-V3, GLM-4.7 Flash
#: and Youtu cache the first of every pair and then the second, DeepSeek-V2 pair by pair.
Order = Literal["deepseek_v3", "deepseek_v2"]
ORDERS = ("deepseek_v3", "deepseek_v2")


def from_cache(
    keys: Tensor, values: Tensor, *, interleaved: bool, order: Order = "deepseek_v3"
) -> Tensor:
    """[k^R, c] of a cache's tokens, (batch, 1, length, rope_width + rank).

    keys: (batch, 1, length, rank), the latents
    values: (batch, 1, length, rope_width), the turned keys
    interleaved: whether the layer turns pairs of neighbours
    order: whose cache it is
    """
    check_choice("order", order, ORDERS)
    if interleaved and order == "deepseek_v3":
        values = torch.stack(values.chunk(2, -1), -1).flatten(-2)
    return torch.cat([values, keys], -1)


def to_cache(
    kept: Tensor, rope_width: int, *, interleaved: bool, order: Order = "deepseek_v3"
) -> tuple[Tensor, Tensor]:
    """keys and values of a cache: `from_cache` the other way round. rope_width: of k^R."""
    check_choice("order", order, ORDERS)
    values, keys = kept[..., :rope_width], kept[..., rope_width:]
    if interleaved and order == "deepseek_v3":
        values = torch.cat([values[..., ::2], values[..., 1::2]], -1)
    return keys, values
