"""A learned projection along the length of a sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.arguments import check_set
from attnzoo.eager import is_recorded, only_autograd_looks
from attnzoo.engines.differentiable import is_followed, open_gradients
from attnzoo.engines.engine import Cost, Shape
from attnzoo.engines.piece_by_piece import join

SHARING = ("none", "headwise", "key_value", "layerwise")


class LengthProjection(nn.Module):
    """A learned projection along the length, (batch, heads, length, d) -> (batch, heads, rank, d)
    for any length up to max_length.

    Its parameter `weight`, (heads, max_length, rank), starts as draws from N(0, 1/rank)
    (Linformer's theorem 1); a shorter input uses its first rows.

    heads: number of heads that have a projection of their own; 1: all heads share one
    max_length: length of the longest input
    rank: length of the result
    """

    def __init__(self, heads: int, max_length: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, max_length, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        with torch.no_grad():
            self.weight.copy_(torch.randn_like(self.weight) * self.weight.shape[2] ** -0.5)

    def keep_heads(self, first: int, count: int) -> None:
        """Keep the weights of `count` heads from `first` on."""
        self.weight = nn.Parameter(
            self.weight.detach()[first : first + count].clone(), self.weight.requires_grad
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = check_set("the projections along its length", self.weight, x).to(x.dtype)
        records = (
            torch.is_grad_enabled()
            and (weight.requires_grad or x.requires_grad)
            and only_autograd_looks(weight, x)
        )
        return _Project.apply(weight, x) if records else _project(weight, x)


def length_projections(
    heads: int, max_length: int, rank: int, sharing: str, given: LengthProjection | None = None
) -> tuple[LengthProjection, LengthProjection]:
    """The projections of keys and of values, one object where sharing makes them one.

    heads, max_length, rank, sharing: as in `Linformer`
    given: with sharing="layerwise", the projection of another layer; None: make a new one

    Raises ValueError if `given` comes with other sharing, or has a weight of another shape.
    """
    wanted = (heads if sharing == "none" else 1, max_length, rank)
    if given is not None and (sharing != "layerwise" or tuple(given.weight.shape) != wanted):
        shape = tuple(given.weight.shape)
        raise ValueError(
            f"projection goes with sharing='layerwise' and a weight of shape {wanted}; got "
            f"sharing={sharing!r} and {shape}"
        )
    keys = given or LengthProjection(*wanted)
    return keys, keys if sharing in ("key_value", "layerwise") else LengthProjection(*wanted)


def _project(weight: Tensor, x: Tensor) -> Tensor:
    return _times(weight[:, : x.shape[2]].mT, x)


def _times(weight: Tensor, x: Tensor) -> Tensor:
    """weight @ x. One product of everything would copy a weight that has heads for every sample."""
    if weight.shape[0] == 1 or x.shape[0] == 1 or is_recorded():
        return weight @ x
    return join(((weight @ sample)[None] for sample in x), x.shape[0], 0)


class _Project(torch.autograd.Function):
    """`_project`, whose gradient of the weight is summed over samples and heads as it comes:
    autograd holds one for each of them first."""

    @staticmethod
    def forward(weight: Tensor, x: Tensor) -> Tensor:
        return _project(weight, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weight, x = ctx.saved_tensors
        if is_followed(gradients[0]):
            to_weight, to_x = open_gradients(_project, (weight, x), gradients[0])
            return to_weight, to_x
        gradient, length = gradients[0].to(x.dtype), x.shape[2]
        to_x = _times(weight[:, :length], gradient) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, to_x
        to_weight = torch.zeros_like(weight)
        for sample, upstream in zip(x, gradient, strict=True):
            for head in range(x.shape[1]):
                to_weight[head % weight.shape[0], :length].addmm_(sample[head], upstream[head].mT)
        return to_weight, to_x


@dataclass(frozen=True)
class ProjectedCost:
    """What softmax attention to projected keys and values costs, with weights of the inputs' dtype.

    shape: the sizes before the projection
    rank: length of the projected keys and values
    per_head: whether every head has a weight of its own, in which case keys and values that query
        heads share are projected once for each of these
    """

    shape: Shape
    rank: int
    per_head: bool

    @property
    def group(self) -> int:
        return self.shape.heads // self.shape.kv_heads if self.per_head else 1

    @property
    def projected(self) -> Shape:
        """The sizes of the softmax over projected keys."""
        return replace(self.shape, kv_heads=self.shape.kv_heads * self.group, key_length=self.rank)

    def cost(self, attending: Cost, projections: int) -> Cost:
        """The cost of projecting and then attending.

        attending: the cost of the softmax over projected keys
        projections: how many different weights there are, 1 or 2
        """
        projected = self.projected
        macs = (
            2
            * self.shape.batch_size
            * projected.kv_heads
            * self.shape.key_length
            * self.rank
            * self.shape.head_dim
            + attending.macs
        )
        rows_read = projections * (self.shape.heads if self.per_head else 1) * self.shape.key_length
        return Cost(
            macs=macs,
            support_macs=macs,
            elementwise=attending.elementwise,
            moved_bytes=self.shape.input_bytes
            + self.shape.query_bytes
            + rows_read * self.rank * self.shape.dtype.itemsize,
        )
