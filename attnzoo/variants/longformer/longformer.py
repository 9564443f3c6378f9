"""Longformer: a window, and a few global tokens that see every key and that every query sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from attnzoo.attention import Attention, Spec
from attnzoo.engines.softmax.distance_bias import DISTANCE_BIAS
from attnzoo.engines.sparse.patterns.window import Window
from attnzoo.registry import register
from attnzoo.variants.longformer.window_and_globals import GLOBAL_MASK, OWN, WindowAndGlobals


@register
class Longformer(Attention):
    """Longformer (Beltagy et al. 2020, section 3.1).

        A_ij = exp(s_ij) / Σ_{l ∈ S(i)} exp(s_il) if j ∈ S(i), else 0, S(i) = {l : |i - l| < window}
            ∪ G; S(i) = all keys where i ∈ G

    Every row sees its window and the global tokens G, and a global token's row sees every key:
    softmax is exact on S, a set, in which a global token inside the window counts once. Cost n·(w +
    g) instead of n². Two tokens that are farther apart than the window reach each other through a
    global token in two layers; what is not global and outside the window is lost in one. Use it
    where a few tokens stand for the whole: [CLS] for classification, the question for question
    answering, prompts. Without such tokens it is `sliding_window`.

    Which tokens are global is told by the call: `global_mask`, (batch, key_length) bool, any number
    of a sample, none included. global_tokens names them once and for all: the first real tokens of
    every sample (1 is [CLS]), besides those of the mask; `cost` counts these. As in the paper, the
    rows of global tokens may have projections of their own, the call's `global_q`, `global_k` and
    `global_v` (shaped as q, k and v, which stand in for one that is not given), or all three as
    `global_qkv`: they are softmax(s·q_g k_gᵀ) v_g over all keys, while the other rows read plain k
    and v everywhere.
    `MultiheadAttention` learns such projections. Causal, a global token sees its past and only
    later tokens see it. Decoding keeps the last `window` keys and the global ones; those of a mask
    must come before the first key is dropped, and with projections of their own in the first step.

    The number of global tokens in a mask is read from it (on CUDA that waits). Where it cannot be
    (a compiled, traced or exported graph, torch.func), a mask may name all tokens, and costs as
    much: name them by global_tokens there.

    window: keys on each side, the query's own included; Longformer's attention_window is 2 ·
        (window - 1) (`attnzoo.engines.sparse.patterns.window.Window.from_longformer`)
    dilation: distances in the window are multiples of it, so that as many keys come from farther;
        one number, or one for each head, as the paper's character models have it in higher layers
    global_tokens: how many tokens at the beginning of every sample are global
    scale: factor of the scores, 1/sqrt(head_dim) by default
    dropout: probability that an entry of A is dropped, in training only
    softcap: keeps scores within ±softcap, see `standard`
    """

    spec = Spec(
        name="longformer",
        title="Longformer",
        paper="Beltagy et al., Longformer: The Long-Document Transformer, 2020, arXiv:2004.05150",
        equation="A_ij = exp(q_i·k_j/√d) / Σ_{l∈S(i)} exp(q_i·k_l/√d), "
        "j ∈ S(i) = window ∪ global, all keys where i is global",
        complexity="O(n·(w+g)) time, O(n) memory",
        family="sparse",
        exact=True,
        dropout=True,
        inputs=(GLOBAL_MASK, *OWN, DISTANCE_BIAS),
    )
    own_projection = "global_projection"
    engine: WindowAndGlobals

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        window: int = 256,
        dilation: int | Sequence[int] = 1,
        global_tokens: int = 0,
        scale: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        backend: str = "auto",
    ) -> None:
        pattern = Window(window, tuple(dilation) if isinstance(dilation, Sequence) else dilation)
        super().__init__(
            heads,
            head_dim,
            WindowAndGlobals(pattern, global_tokens, scale, dropout, softcap=softcap),
            backend=backend,
        )
        pattern.heads_by_dilation(heads)  # raises where there are not as many
        self.global_tokens = global_tokens
        #: The global_mask of calls that bring none, see `attnzoo.global_mask`.
        self.global_mask: Tensor | None = None
        #: What a layer makes global_q, global_k and global_v with; a process of several has one
        #: linear layer for each.
        self.global_projection: nn.Linear | nn.ModuleDict | None = None

    def with_own_inputs(
        self, inputs: dict[str, Any], k: Tensor, seen: int | None
    ) -> dict[str, Any]:
        inputs = dict(inputs)
        for packed, count in (("global_qkv", 3), ("global_qk", 2)):
            own = inputs.pop(packed, None)
            if own is None:
                continue
            if not isinstance(own, tuple) or len(own) != count:
                raise ValueError(
                    f"{packed} must be a tuple of {'three' if count == 3 else 'two'} tensors: "
                    f"{', '.join(packed.removeprefix('global_'))} of the global tokens' rows"
                )
            for letter, x in zip("qkv", own, strict=False):
                if not isinstance(x, Tensor) or (isinstance(k, Tensor) and x.dtype != k.dtype):
                    found = f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
                    raise ValueError(
                        f"{letter} in {packed} is of {found}; give a tensor of the dtype of q, k "
                        f"and v, {getattr(k, 'dtype', 'a floating one')}"
                    )
            inputs.update(zip((one.name for one in OWN), own, strict=False))
        if self.global_mask is not None and inputs.get("global_mask") is None:
            first = 0 if seen is None else seen
            mask = self.global_mask[:, first : None if seen is None else first + k.shape[2]]
            inputs["global_mask"] = nn.functional.pad(mask, (0, max(0, k.shape[2] - mask.shape[1])))
        return inputs

    def wants_own_projection(self, inputs: Mapping[str, Any]) -> bool:
        named = inputs.get("global_mask") is not None or self.global_mask is not None
        return named or self.global_tokens > 0

    def keep_heads(self, first: int, count: int) -> None:
        heads = self.heads
        super().keep_heads(first, count)
        self.engine.pattern = self.engine.pattern.of_heads(first, count)
        projection = self.global_projection
        for name, parameter in () if projection is None else list(projection.named_parameters()):
            kept = (
                parameter.detach()
                .unflatten(0, (3, heads, self.head_dim))[:, first : first + count]
                .flatten(0, 2)
                .clone()
            )
            setattr(projection, name, nn.Parameter(kept, parameter.requires_grad))
