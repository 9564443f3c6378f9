"""What the tests of MultiheadAttention share: sizes, masks in torch's dialect, and modules made
from one seed."""

from __future__ import annotations

from typing import Any

import torch
from cases import Case, usual_cases
from torch import Tensor, nn

from attnzoo import MultiheadAttention
from attnzoo.registry import sized

BATCH, QUERIES, KEYS, SIZE, HEADS = 2, 5, 7, 12, 3
DOUBLE: dict[str, Any] = {"atol": 1e-11, "rtol": 1e-10}
SINGLE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}
CAUSAL_CASES = [case for case in usual_cases() if case.spec.causal]


def options_of(case: Case) -> dict[str, Any]:
    """The arguments that choose the case's attention."""
    return {
        "attention": case.variant,
        "attention_options": {**sized(case.variant, 64), **case.options},
    }


def as_float(mask: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """0 and -inf for False and True."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, float("-inf"))


def pair(*, seed: int = 3, **options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """torch's module and this one, each made from the same seed."""
    options = {"embed_dim": SIZE, "num_heads": HEADS, "dtype": torch.float64, **options}
    torch.manual_seed(seed)
    theirs = nn.MultiheadAttention(**options)
    torch.manual_seed(seed)
    return theirs, MultiheadAttention(**options)
