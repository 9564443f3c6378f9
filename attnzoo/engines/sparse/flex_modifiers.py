"""The functions that FlexAttention's kernels ask about a score: whether the row sees the key, and
what the score becomes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.softmax.distance_bias import DISTANCE_BIAS

#: Of (sample, head, row, key), numbers as tensors without dimensions.
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
#: Of (score, sample, head, row, key).
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def mask_mod(first: Tensor, window: Tensor | None, call: Call) -> MaskMod:
    """Whether a row sees a key, by causality, the edge of a window, padding and pieces.

    first: the position of row 0, a tensor, since each new Python number would compile a new graph
    window: keys at this distance or more are hidden, also a tensor; None: no distance hides
    """
    is_causal, key_mask, segments = bool(call.is_causal), call.key_mask, call.segments

    def visible(sample: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        distance = row + first - key
        seen = key >= 0
        if is_causal:
            seen = seen & (distance >= 0)
        if window is not None:
            seen = seen & (distance.abs() < window)
        if key_mask is not None:
            seen = seen & key_mask[sample, key]
        if segments is not None:
            # A row before every key is of any piece.
            seen = seen & (segments[sample, (row + first).clamp(min=0)] == segments[sample, key])
        return seen

    return visible


def score_mod(first: Tensor, softcap: float | None, call: Call) -> ScoreMod | None:
    """What becomes of a score: it is kept within ±softcap, and the bias of its distance is added.
    None where it stays as it is.

    first: the position of row 0, a tensor
    """
    bias = call.get(DISTANCE_BIAS.name)
    if softcap is None and bias is None:
        return None
    last = torch.full((), 0 if bias is None else bias.shape[1] - 1, device=first.device)

    def changed(score: Tensor, sample: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            # A block also has keys that no row sees, beyond what the table reaches.
            place = (key - row - first + last // 2).clamp(min=0)
            score = score + bias[head, torch.minimum(place, last)]
        return score

    return changed
