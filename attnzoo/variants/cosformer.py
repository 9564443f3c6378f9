"""cosFormer: linear attention with ReLU features, and a cosine that favours near keys."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.arguments import check_max_length, check_positive
from attnzoo.attention import Attention, Spec
from attnzoo.call import Call
from attnzoo.eager import is_recorded
from attnzoo.engines.engine import Cost, Shape
from attnzoo.engines.linear.feature_maps import Pointwise, identity
from attnzoo.engines.linear.linear import Linear
from attnzoo.registry import register


class Halves(Pointwise):
    """φ(x) = x, where x already holds both halves of the features, those with the cosine and those
    with the sine."""

    def __init__(self) -> None:
        super().__init__(identity, normalize=True)

    def width(self, head_dim: int) -> int:
        return 2 * head_dim

    def width_of(self, k: Tensor) -> int:
        return k.shape[-1]


@register
class Cosformer(Attention):
    """cosFormer (Qin et al. 2022, section 3.2, equations 10 to 12).

        A_ij = w_ij / Σ_l w_il,    w_ij = relu(q_i)·relu(k_j) · cos(π/2 · (i − j)/max_length)

    cos(a − b) = cos a cos b + sin a sin b, so w is a product of features twice as wide, and the
    cost is linear. What is kept of softmax is that A is not negative, that its rows sum to 1 and,
    by the cosine, that near keys weigh more; what is lost is sharpness, for no score is
    exponentiated, and a query without positive numbers sees nothing. Use it in place of linear
    attention where near tokens matter more; not where inputs are far shorter than max_length, for
    there the cosine is 1 everywhere.

    max_length: the longest sequence, the paper's M; at this distance the cosine is 0
    """

    spec = Spec(
        name="cosformer",
        title="cosFormer",
        paper="Qin et al., cosFormer: Rethinking Softmax in Attention, 2022, arXiv:2202.08791",
        equation="A_ij = w_ij / Σ_l w_il, w_ij = relu(q_i)·relu(k_j)·cos(π(i − j)/2M)",
        complexity="O(n) time and memory",
        family="kernel",
        exact=False,
        needs_max_length=True,
    )

    def __init__(
        self, heads: int, head_dim: int, *, max_length: int, backend: str = "auto"
    ) -> None:
        super().__init__(heads, head_dim, Linear(Halves()), backend=backend)
        self.max_length = check_positive("max_length", max_length)

    @property
    def packs(self) -> bool:
        """The cosine is of the distance of two tokens, whatever stands before their piece."""
        return True

    def place(self, call: Call, seen: int) -> Call:
        length = seen + call.key_length
        check_max_length(
            self.spec.name, self.max_length, key_length=length, query_length=call.query_length
        )
        turns = self._turns(call.k, seen)
        same = call.query_length == call.key_length
        of_queries = turns if same else self._turns(call.q, length - call.query_length)
        return replace(call, q=_halves(call.q, of_queries), k=_halves(call.k, turns))

    def _turns(self, x: Tensor, start: int) -> Tensor:
        """cos(πi/2M) and sin(πi/2M) for the positions i of x, from `start` on, (length, 2, 1)."""
        if x.shape[2] == 1 and not is_recorded():  # a step of decoding
            angle = start * (math.pi / (2 * self.max_length))
            return torch.tensor([[[math.cos(angle)], [math.sin(angle)]]], dtype=x.dtype).to(
                x.device
            )
        positions = torch.arange(
            start,
            start + x.shape[2],
            dtype=torch.float64 if x.dtype == torch.float64 else torch.float32,
            device=x.device,
        )
        angles = positions * (math.pi / (2 * self.max_length))
        return torch.stack([angles.cos(), angles.sin()], -1).to(x.dtype)[..., None]

    def count(self, shape: Shape) -> Cost:
        cost, turned = self.engine.cost(shape), shape.key_length
        if shape.query_length != shape.key_length:
            turned += shape.query_length
        return replace(cost, elementwise=cost.elementwise + 2 * turned)


def _halves(x: Tensor, turns: Tensor) -> Tensor:
    """[relu(x) cos(πi/2M), relu(x) sin(πi/2M)], (batch, heads, length, 2 · head_dim).

    turns: (length, 2, 1)
    """
    return (F.relu(x)[..., None, :] * turns).flatten(-2)
