"""Convolutions while a module is traced on the meta device, where torch works out their shape in
Python from sizes that the tracer has turned into tensors, and fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.cost.tracing.operators import shape_of


class Convolution(torch.autograd.Function):
    """One convolution, out of sight of the tracer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, convolve: Callable[..., Tensor]
    ) -> Tensor:
        tracing = torch._C._get_tracing_state()
        torch._C._set_tracing_state(None)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            return convolve(x, weight, bias)
        finally:
            torch._C._set_tracing_state(tracing)  # pyright: ignore[reportAttributeAccessIssue]


def convolution_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """A product for each number of a filter at each place of the output.

    inputs: x, weight, bias.
    """
    return Counter({"conv": prod(shape_of(outputs[0])) * prod(shape_of(inputs[1])[1:])})


@contextmanager
def convolutions_as_one_operator(module: nn.Module) -> Iterator[None]:
    """Inside, the convolutions of a module on the meta device are `prim::PythonOp.Convolution`."""
    found = [
        part
        for part in module.modules()
        if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d) and part.weight.is_meta
    ]
    for part in found:
        part._conv_forward = _hidden(part._conv_forward)
    try:
        yield
    finally:
        for part in found:
            del part._conv_forward


def _hidden(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, weight, bias: Convolution.apply(x, weight, bias, convolve)
