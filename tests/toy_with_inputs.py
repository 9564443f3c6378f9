"""A made-up variant with made-up inputs, written as a stranger would: one file, no word of masks,
padding, decoding or layers. `test_inputs` registers it for its own tests."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from attnzoo import Attention, Input, Spec
from attnzoo.call import Call
from attnzoo.engines.softmax.softmax import Softmax


class Weighted(Attention):
    """Softmax whose keys have a weight and whose queries a sharpness.

    A_ij = exp(t_i · s_ij + w_j) / Σ_l exp(t_i · s_il + w_l)
    """

    spec = Spec(
        name="weighted",
        title="Weighted attention",
        paper="no paper: made up",
        equation="A_ij = exp(t_i·s_ij + w_j) / Σ_l exp(t_i·s_il + w_l)",
        complexity="O(n²) time, O(n) memory",
        family="exact",
        exact=False,
        inputs=(
            Input("log_weight", "batch kv_heads keys", padded=0.0, activation=F.logsigmoid),
            Input("sharpness", "batch heads queries", required=True, activation=F.softplus),
        ),
    )

    def __init__(self, heads: int, head_dim: int, *, backend: str = "auto") -> None:
        super().__init__(heads, head_dim, Softmax(head_dim**-0.5), backend=backend)

    def place(self, call: Call, seen: int) -> Call:
        weight = call.get("log_weight")
        if weight is None:
            weight = call.k.new_zeros(call.k.shape[:3])
        q = call.q * call.inputs["sharpness"][..., None].to(call.q.dtype)
        one = torch.full_like(q[..., :1], self.head_dim**0.5)
        return replace(
            call,
            q=torch.cat([q, one], -1),
            k=torch.cat([call.k, weight[..., None].to(call.k.dtype)], -1),
        )
