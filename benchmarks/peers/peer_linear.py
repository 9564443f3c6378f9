# pyright: reportMissingImports=false
"""How peers of linear cost are called: kernels and low rank."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any

import peer_formulas as formulas
import torch
import torch.nn.functional as F
from peer_settings import (
    FEATURES,
    LANDMARKS,
    PSEUDO_INVERSE_STEPS,
    RANK,
    Given,
    Ready,
    Thirds,
    width_of,
)
from torch import Tensor, nn

from attnzoo.benchmarking.plan import Cell


def fast_transformers(cell: Cell) -> Ready:
    from fast_transformers.attention import CausalLinearAttention, LinearAttention
    from fast_transformers.masking import FullMask, LengthMask, TriangularCausalMask

    attend = (CausalLinearAttention if cell.is_causal else LinearAttention)(cell.shape.head_dim)
    mask = TriangularCausalMask(cell.length) if cell.is_causal else FullMask(cell.length)
    lengths = LengthMask(torch.tensor([cell.length]))
    return Ready(
        lambda q, k, v: attend(q, k, v, mask, lengths, lengths),
        formulas.kernel(formulas.elu_features, formulas.elu_features),
    )


def fla_naive(cell: Cell) -> Ready:
    with warnings.catch_warnings(action="ignore"):  # it regrets that there is no GPU
        from fla.ops.linear_attn.naive import naive_chunk_linear_attn

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return naive_chunk_linear_attn(F.elu(q) + 1, F.elu(k) + 1, v, scale=1.0, normalize=True)

    return Ready(forward, formulas.kernel(formulas.elu_features, formulas.elu_features))


def linear_attention_transformer(cell: Cell) -> Ready:
    from linear_attention_transformer.linear_attention_transformer import (
        causal_linear_attn,
        linear_attn,
    )

    if cell.is_causal:
        return Ready(causal_linear_attn, formulas.kernel(lambda q: q.softmax(-1), torch.exp))
    return Ready(linear_attn, formulas.efficient(cell.shape.head_dim**-0.5))


def performer_pytorch(cell: Cell) -> Ready:
    from performer_pytorch import FastAttention

    with contextlib.redirect_stdout(io.StringIO()):  # it announces that it has no CUDA code
        attend = FastAttention(cell.shape.head_dim, nb_features=FEATURES, causal=cell.is_causal)
    features = formulas.positive_features(attend.projection_matrix)
    return Ready(attend, formulas.kernel(features, features))


def linformer(cell: Cell) -> Ready:
    from linformer import LinformerSelfAttention

    module: Any = LinformerSelfAttention(
        width_of(cell), cell.length, k=RANK, heads=cell.shape.heads
    ).eval()
    module.to_q, module.to_k, module.to_v, module.to_out = Given(), Given(), Given(), nn.Identity()
    hidden = torch.zeros(1, cell.length, width_of(cell))

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        module.to_q.value, module.to_k.value, module.to_v.value = (x.flatten(2) for x in (q, k, v))
        return module(hidden)

    return Ready(
        forward,
        formulas.projected(module.proj_k.detach(), module.proj_v.detach()),
        (module.proj_k, module.proj_v),
    )


def nystrom_attention(cell: Cell) -> Ready:
    from nystrom_attention import NystromAttention

    module: Any = NystromAttention(
        width_of(cell),
        cell.shape.head_dim,
        cell.shape.heads,
        num_landmarks=LANDMARKS,
        pinv_iterations=PSEUDO_INVERSE_STEPS,
        residual=False,
    ).eval()
    module.to_qkv, module.to_out = Given(), nn.Identity()
    hidden = torch.zeros(1, cell.length, width_of(cell))

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        module.to_qkv.value = Thirds(x.flatten(2) for x in (q, k, v))
        return module(hidden)

    return Ready(forward, formulas.nystrom(LANDMARKS, PSEUDO_INVERSE_STEPS))
