"""What a latent layer makes of hidden states: queries, and one vector a token from which its keys
and values are made."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

#: Added to the mean square in the norms of latents, as DeepSeek-V3 has it.
EPS = 1e-6


class LatentProjections(nn.Module):
    """Down- and up-projections to queries and down-projections of keys and values.

        q_t = W_q x_t, or W_q RMSNorm(W_dq x_t);    [k^R_t, c_t] = W_dkv x_t;    c_t = RMSNorm(c_t)

    embed_dim: width of a hidden state
    num_heads: heads of the queries
    widths: of the turned and of the other features of a query head
    kv_lora_rank: width of c_t
    q_lora_rank: width of the latent of queries; None: there is none
    bias: whether the down-projections have one

    Source: DeepSeek-AI, DeepSeek-V2, 2024, arXiv:2405.04434, equations 37 to 43.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        widths: tuple[int, int],
        kv_lora_rank: int,
        q_lora_rank: int | None,
        bias: bool,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.rope_width = widths[0]
        of_queries = num_heads * sum(widths)
        if q_lora_rank is None:
            self.q_proj = nn.Linear(embed_dim, of_queries, bias=False, **factory)
        else:
            self.q_down = nn.Linear(embed_dim, q_lora_rank, bias=bias, **factory)
            self.q_norm = nn.RMSNorm(q_lora_rank, EPS, **factory)
            self.q_proj = nn.Linear(q_lora_rank, of_queries, bias=False, **factory)
        self.kv_down = nn.Linear(embed_dim, self.rope_width + kv_lora_rank, bias=bias, **factory)
        self.kv_norm = nn.RMSNorm(kv_lora_rank, EPS, **factory)

    def forward(self, query: Tensor, key: Tensor, pattern: str) -> tuple[Tensor, Tensor, Tensor]:
        """query, key: hidden states, in the layout that pattern begins with
        pattern: as `project` takes it
        returns: q, (batch, heads, queries, widths); [k^R, c], (batch, 1, keys, rope + latent), not
            yet turned; and nothing in place of values, (batch, 1, keys, 0)
        """
        if "q_down" in self._modules:
            query = _normalised(self.q_norm, self.q_down(query))
        q = rearrange(self.q_proj(query), pattern, p=1, h=self.num_heads)[0]
        down = rearrange(self.kv_down(key), pattern, p=1, h=1)[0]
        rope, latent = down[..., : self.rope_width], down[..., self.rope_width :]
        k = torch.cat([rope, _normalised(self.kv_norm, latent)], -1)
        return q, k, k[..., :0]

    def reset_parameters(self) -> None:
        """Draw the projections as torch's MultiheadAttention draws its own."""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            else:
                module.reset_parameters()  # pyright: ignore[reportCallIssue]


def _normalised(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """In the precision of the norm's weight: under autocast, x is less precise."""
    return norm(x.to(norm.weight.dtype)).to(x.dtype)
