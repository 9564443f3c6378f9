"""Linformer: softmax over a fixed number of learned mixtures of the keys."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.arguments import check_choice, check_max_length, check_positive
from attnzoo.attention import Attention, Spec
from attnzoo.call import Call, repeat_heads
from attnzoo.engines.engine import Cost, Shape
from attnzoo.engines.softmax.softmax import Softmax
from attnzoo.registry import register
from attnzoo.sequences.padding import ahead_behind, starts_real
from attnzoo.variants.linformer.length_projection import (
    SHARING,
    LengthProjection,
    ProjectedCost,
    length_projections,
)


@register
class Linformer(Attention):
    """Linformer (Wang et al. 2020, section 4, equation 7).

        A = softmax(scale · Q (Eᵀ K)ᵀ) Fᵀ,    E, F: length × rank, learned

    Queries weigh `rank` mixtures of the keys instead of the keys: n·rank scores. What is kept is
    softmax, over the mixtures; the paper's argument is that its A is of low rank. What is lost is
    any weight on a single key, order (a mixture is tied to positions), and causality, since a
    mixture holds the future. Use it in encoders trained with it, at lengths near max_length; not
    swapped in without training, for then E and F are random and the output is noise.

    max_length: number of keys that E and F are made for; a call may have fewer
    rank: number of mixtures, the paper's k
    sharing: "none" (E and F of each head), "headwise" (one E and one F for all heads), "key_value"
        (E = F for all heads) or "layerwise" (as key_value, and one projection for all layers)
    projection: for sharing="layerwise", the `key_projection` of the first layer, which is built
        without it; every other layer is given it
    scale: factor of the scores, 1/sqrt(head_dim) by default
    dropout: probability that an entry of A is dropped, in training only
    """

    spec = Spec(
        name="linformer",
        title="Linformer",
        paper="Wang et al., Linformer: Self-Attention with Linear Complexity, 2020, "
        "arXiv:2006.04768",
        equation="A = softmax(Q (EᵀK)ᵀ/√d) Fᵀ with learned E, F: n × rank",
        complexity="O(n·r) time, O(n) memory",
        family="low_rank",
        exact=False,
        causal=False,
        dropout=True,
        decodes=False,
        needs_max_length=True,
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        max_length: int,
        rank: int = 256,
        sharing: str = "headwise",
        projection: LengthProjection | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(heads, head_dim, Softmax(scale, dropout), backend=backend)
        self.max_length, self.rank = (
            check_positive("max_length", max_length),
            check_positive("rank", rank),
        )
        self.sharing = check_choice("sharing", sharing, SHARING)
        self.key_projection, self.value_projection = length_projections(
            heads, max_length, rank, sharing, projection
        )

    def shared_options(self) -> dict[str, Any]:
        return {"projection": self.key_projection} if self.sharing == "layerwise" else {}

    def keep_heads(self, first: int, count: int) -> None:
        super().keep_heads(first, count)
        if self.sharing == "none":
            for projection in (self.key_projection, self.value_projection):
                projection.keep_heads(first, count)

    def place(self, call: Call, seen: int) -> Call:
        check_max_length(self.spec.name, self.max_length, key_length=call.key_length)
        return call

    def attend(self, call: Call, backend: str, state: Any = None) -> tuple[Tensor, str, Any]:
        k, v = call.k, call.v
        if call.key_mask is not None and not starts_real(call.key_mask):
            k, v = (ahead_behind(x, call.key_mask) for x in (k, v))
        k, v = (repeat_heads(x, call.group) if self.sharing == "none" else x for x in (k, v))
        mixed = call.over(call.q, self.key_projection(k), self.value_projection(v), None)
        out, name, _ = self.engine(mixed, backend)
        if call.key_mask is not None:
            out = out.masked_fill(~call.key_mask.any(1)[:, None, None, None], 0.0)
        return out, name, None

    def count(self, shape: Shape) -> Cost:
        check_max_length(self.spec.name, self.max_length, key_length=shape.key_length)
        whole = ProjectedCost(shape, self.rank, per_head=self.sharing == "none")
        return whole.cost(
            self.engine.cost(whole.projected),
            projections=1 if self.value_projection is self.key_projection else 2,
        )

    def oracle_arguments(self, queries: int, keys: int, is_causal: bool) -> dict[str, Any]:
        return {
            "key_projection": self.key_projection.weight,
            "value_projection": self.value_projection.weight,
        }
