"""Token shift: each projection of a layer reads a mix of a token and the one before it, which
padding and other pieces do not reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from attnzoo.arguments import check_flag
from attnzoo.call import UnsupportedError
from attnzoo.layers.layer import Layer
from attnzoo.layers.options.output_gate import GATE_PROJECTION
from attnzoo.layers.options.short_convolution import LastTokens, in_pieces, last_tokens
from attnzoo.spec import Spec

#: Where a layer has it, and the name of its state.
TOKEN_SHIFT = "token_shift"
#: What the gate of the output reads, beside the names of projections and of inputs.
GATE = "gate"
#: What the exponents of the first mixes are, by projection; those of inputs have another.
EXPONENTS, OF_INPUTS = {"q": 0.2, "qk": 0.2, "k": 0.7, "v": 0.7, GATE: 0.2}, 0.9


class TokenShift(nn.Module):
    """What each projection reads of a token t: x_t + μ ∘ (x_{t−1} − x_t), with a μ of its own.

    Before the first token of a sample or of a piece stands 0, and so it does where padding is. A μ
    begins as 1 − (i / features)^p over the channels i, as in RWKV-LM's first layer.

    names: of the projections
    features: of a token

    Source: Peng et al., RWKV-7 Goose, 2025, arXiv:2503.14456, section 4, and its code.
    """

    def __init__(self, names: list[str], features: int, **factory: Any) -> None:
        super().__init__()
        self.names = tuple(names)
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.empty(features, **factory)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for name in self.names:
            mix = getattr(self, name)
            place = torch.arange(len(mix)) / len(mix)
            mix.copy_(1 - place ** EXPONENTS.get(name, OF_INPUTS))

    def forward(
        self, x: Tensor, key_mask: Tensor | None, segments: Tensor | None, before: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """x: (batch, features, length)
        key_mask: (batch, length) bool, True = a real token
        segments: (batch, length) integer
        before: (batch, features, slots), the last tokens of the piece that the first goes on with;
            None: there are none
        returns: what each reads, as x, and x without padding
        """

        def earlier(x: Tensor, ids: Tensor | None) -> Tensor:
            lead = torch.zeros_like(x[..., :1]) if before is None else before[..., -1:]
            moved = torch.cat([lead, x], -1)[..., : x.shape[-1]]
            if ids is None:
                return moved
            begins = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0))
            return moved.masked_fill(begins[:, None], 0.0)

        if key_mask is not None:
            x = x.masked_fill(~key_mask[:, None], 0.0)
        change = in_pieces(x, segments, earlier) - x
        mixes = {name: getattr(self, name)[:, None] for name in self.names}
        return {name: torch.addcmul(x, change, mix) for name, mix in mixes.items()}, x


@dataclass(frozen=True)
class Sources:
    """What the projections of a layer read.

    q, k, v: hidden states as the call has them, or as a token shift mixes them for each
    others: what a token shift makes of them for other projections, by name
    after: what is left of the tokens for those to come
    """

    q: Tensor
    k: Tensor
    v: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)
    after: Mapping[str, LastTokens] = field(default_factory=dict)


def check_token_shift(shift: Any, spec: Spec) -> None:
    """Raise a ValueError on what is no flag, UnsupportedError on a core that is never causal."""
    if check_flag(TOKEN_SHIFT, shift) and not spec.causal:
        raise UnsupportedError(
            f"token_shift=True reads earlier tokens, and {spec.name} cannot be causal; build the "
            "layer without it"
        )


def add_token_shift(layer: Any, inputs: list[str]) -> None:
    """Give a layer that has all else its token shift. inputs: those made of hidden states."""
    like, gates = layer.out_proj.weight, [GATE] if GATE_PROJECTION in layer._modules else []
    names = [*layer.attention.projected, *inputs, *gates]
    shift = TokenShift(names, layer.embed_dim, device=like.device, dtype=like.dtype)
    setattr(layer, TOKEN_SHIFT, shift)


def shifted_sources(
    layer: Layer,
    x: Tensor,
    axes: str,
    key_mask: Tensor | None,
    segments: Tensor | None,
    before: Mapping[str, LastTokens] | None = None,
) -> Sources:
    """What a layer's projections read of one sequence, by its token shift.

    x: hidden states, whose leading axes are `axes`, in einops' words
    key_mask, segments: (batch, length) of the call
    before: as `Placement` has it
    """
    batch = "b" if x.dim() == 3 else "1"
    past = None if before is None else before.get(TOKEN_SHIFT)
    made, read = layer._modules[TOKEN_SHIFT](
        rearrange(x, f"{axes} d -> {batch} d l"),
        key_mask,
        segments,
        None if past is None else past.tokens,
    )
    made = {name: rearrange(one, f"{batch} d l -> {axes} d") for name, one in made.items()}
    q, k = (made.pop(name, None) for name in ("q", "k"))
    if q is None:
        q = k = made.pop("qk")
    after = {} if before is None else {TOKEN_SHIFT: last_tokens(read, 2, past, segments)}
    return Sources(q, k, made.pop("v"), made, after)
