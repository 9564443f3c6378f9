"""The exponential, by the faster of two kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG2_E, LN_2 = math.log2(math.e), math.log(2)
TWO_PASSES = (torch.float32, torch.float64)  # in half precision x·log2 e would be rounded once more


def exp_(x: Tensor) -> Tensor:
    """e^x in the place of x. On a CPU as 2^(x·log2 e): torch hands exp to MKL, which takes two to
    four times as long as torch's own exp2.

    Its relative error grows with |x|, as that of any x that was rounded does: in float32 5e-7 up to
    10, 4e-6 at 87.
    """
    return x.mul_(LOG2_E).exp2_() if x.device.type == "cpu" and x.dtype in TWO_PASSES else x.exp_()
