"""The exponential function, by the faster of two ways that torch has."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2_E, LN_2 = math.log2(math.e), math.log(2)
# Dtypes in which e^x is taken as 2^(x·log2 e). In half precision rounding the product x·log2 e
# would cost too many digits.
TWO_PASSES = (torch.float32, torch.float64)


def exp_(x: Tensor) -> Tensor:
    """e^x, written in place of x.

    On a CPU it is computed as 2^(x·log2 e): torch hands exp to the MKL library, which takes two to
    four times as long as torch's own exp2. The product is rounded, so that the relative error grows
    with |x|: in float32 it is 5e-7 up to |x| = 10, and 4e-6 at 87.

    x: of any shape, overwritten

    Returns x.
    """
    return x.mul_(LOG2_E).exp2_() if x.device.type == "cpu" and x.dtype in TWO_PASSES else x.exp_()


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), by an operator whose backward pass is traced as it runs: torch 2.13 traces that
    of its own softplus with other strides than the kernel gives."""
    return -F.logsigmoid(-x)
