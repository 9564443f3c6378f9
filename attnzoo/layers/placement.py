"""What a layer does to projected queries, keys and values before its attention gets them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from attnzoo.layers.layer import Layer
from attnzoo.layers.options.qk_norm import normalised
from attnzoo.layers.options.short_convolution import LastTokens, convolution_of, last_tokens


@dataclass(frozen=True)
class Placement:
    """The short convolution, the norms and the turns of one call of a layer.

    positions: of the slots, as `positions_of` gives them; None where nothing is turned
    key_mask, segments: (batch, length) of the call
    before: what the tokens before the call have left of each kind of projection; None: there were
        none, and nothing is left for tokens to come
    after: what they and the call's tokens have left, where `before` is given
    """

    layer: Layer
    positions: Tensor | None
    key_mask: Tensor | None
    segments: Tensor | None
    before: Mapping[str, LastTokens] | None = None
    after: dict[str, LastTokens] = field(default_factory=dict)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, kind: str = "plain"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v: (batch, heads, length, head_dim); q and k that are one tensor stay one
        kind: of the projection that made them
        """
        q, k, v = self._convolved(q, k, v, kind)
        q, k = normalised(self.layer, q, k)
        rotary = self.layer._modules.get("rotary")
        if rotary is not None:
            q, k = rotary(q, k, self.positions)
        return q, k, v

    def _convolved(
        self, q: Tensor, k: Tensor, v: Tensor, kind: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        convolution = convolution_of(self.layer)
        if convolution is None:
            return q, k, v
        past = None
        if self.before:
            past = self.before.get(kind)
            if past is None:
                raise ValueError(
                    f"the short convolution of the {kind} projections reads the tokens before "
                    "these, for which they were not made; name global tokens from the first step "
                    "on, or from none"
                )
        parts = [q, v] if q is k else [q, k, v]
        earlier = None if past is None else past.tokens
        made, read = convolution(parts, self.key_mask, self.segments, earlier)
        if self.before is not None:
            taps = convolution.kernel_size[0]
            self.after[kind] = last_tokens(read, taps, past, self.segments)
        return made[0], made[-2], made[-1]
