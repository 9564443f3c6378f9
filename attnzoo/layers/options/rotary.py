"""Rotary position embedding (RoPE): queries and keys rotated by their positions, so that a score
depends on how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.arguments import check_positive, nearest
from attnzoo.layers.options.yarn import yarn_of


class RotaryEmbedding(nn.Module):
    """Pairs of features rotated by the angle position · base^(−2i/width), i counting the pairs.

    head_dim: width of a head
    base: above 1; pairs turn once in 2π tokens, the first, up to almost 2π · base, the last
    width: how many features of a head are rotated, the first ones; None: all of them
    interleaved: whether a pair is two neighbours (GPT-J, GLM) or a feature of the first half of
        the width and one of the second (Llama, Qwen, GPT-NeoX)
    yarn: options of `Yarn`, which slows the turns down for sequences longer than those of training,
        such as {"factor": 40.0, "original_length": 4096}; None: the turns are as they are
    raises: ValueError on a width that is odd or wider than a head, and on a base that is not above
        1

    Source: Su et al., RoFormer, 2021, arXiv:2104.09864, equations 14, 15 and 34.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10_000.0,
        width: int | None = None,
        interleaved: bool = False,
        yarn: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.base = _check_base(base)
        self.width = head_dim if width is None else check_positive("rotary width", width)
        if self.width % 2 or self.width > head_dim:
            raise ValueError(
                f"rotary width={self.width} must be even and at most head_dim={head_dim}, since "
                "features are rotated in pairs; give a smaller even width"
            )
        if not isinstance(interleaved, bool):
            raise ValueError(f"rotary interleaved={interleaved!r} must be True or False")
        self.interleaved = interleaved
        self.yarn = yarn_of(yarn)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """q and k turned.

        q, k: (batch, heads, query_length, head_dim) and (batch, heads, key_length, head_dim); one
            tensor stays one
        positions: (length,) or (batch, length) integer, of the last slots of both: length is the
            longer of the two
        returns: q and k
        """
        turns = self._turns(positions, k)
        turned = self._turned(k, turns)
        return (turned if q is k else self._turned(q, turns)), turned

    def _turns(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (length, width/2) or (batch, 1, length, width/2)."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        pairs = torch.arange(0, self.width, 2, device=positions.device, dtype=dtype) / self.width
        rates = 1.0 / self.base**pairs
        if self.yarn is not None:
            rates = self.yarn.slowed(rates, self.base)
        angles = positions.to(dtype)[..., None] * rates
        angles = angles if positions.dim() == 1 else angles[:, None]
        cos, sin = angles.cos(), angles.sin()
        if self.yarn is not None:
            cos, sin = cos * self.yarn.amplitude, sin * self.yarn.amplitude
        return cos.to(like.dtype), sin.to(like.dtype)

    def _turned(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        length = x.shape[2]
        cos, sin = (one[..., one.shape[-2] - length :, :] for one in turns)
        turning, rest = x[..., : self.width], x[..., self.width :]
        if self.interleaved:
            a, b = turning[..., ::2], turning[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = turning.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned

    def extra_repr(self) -> str:
        sizes = f"base={self.base}, width={self.width}, interleaved={self.interleaved}"
        return sizes if self.yarn is None else f"{sizes}, yarn={self.yarn}"


def rotary_of(head_dim: int, options: Any, extra_keys: bool) -> RotaryEmbedding | None:
    """The embedding that a layer's option `rotary` asks for.

    head_dim: width of a head
    options: True, or a mapping of `RotaryEmbedding`'s options; False or None: no embedding
    extra_keys: whether the layer appends keys
    raises: ValueError on anything else, and beside appended keys, which have no position
    """
    if options is None or options is False:
        return None
    if extra_keys:
        raise ValueError(
            f"rotary={options!r} turns keys by their positions, and add_bias_kv and add_zero_attn "
            "append keys that have none; leave these False"
        )
    if options is True:
        options = {}
    if not isinstance(options, Mapping):
        raise ValueError(
            f"rotary={options!r} must be True, False or a mapping of options, such as "
            "{'base': 500_000.0}"
        )
    known = ("base", "width", "interleaved", "yarn")
    for name in options:
        if name not in known:
            raise ValueError(
                f"rotary has no option {name!r}{nearest(name, known)}; its options are "
                f"{', '.join(known)}"
            )
    return RotaryEmbedding(head_dim, **options)


def _check_base(base: Any) -> float:
    if isinstance(base, bool) or not isinstance(base, int | float) or not 1 < base < math.inf:
        raise ValueError(f"rotary base={base!r} must be a number above 1, such as 10_000.0")
    return float(base)
