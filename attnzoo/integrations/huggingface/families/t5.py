"""T5's family: a learned bias of buckets of distances, which a model makes for all pairs of tokens
and hands from layer to layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.integrations.huggingface.families.call_interface import positions_of


class AttentionByDistance:
    """An attention of T5's family that makes its bias by distance: the same numbers, each once."""

    most_positions: int | None = None

    def compute_bias(
        self: Any,
        query_length: int,
        key_length: int,
        device: torch.device | None = None,
        past_seen_tokens: int | Tensor = 0,
    ) -> Tensor:
        """(heads, 2 · reach + 1), where reach is how far apart a query and a key can stand; the
        arguments are those of transformers' own."""
        count = positions_of(self, past_seen_tokens, query_length, key_length)
        own = super().compute_bias  # pyright: ignore[reportAttributeAccessIssue]
        before = own(1, count, device=device, past_seen_tokens=count - 1)[0, :, 0]
        after = own(1, count, device=device)[0, :, 0, 1:]
        return torch.cat([before, after], 1)
