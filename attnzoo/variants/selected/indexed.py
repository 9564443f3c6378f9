"""DeepSeek's sparse attention: a light indexer ranks the keys, and softmax sees the best."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from attnzoo.arguments import check_flag, check_positive
from attnzoo.attention import Attention, Spec
from attnzoo.call import Call
from attnzoo.engines.engine import Backend, Cost, Shape, causal_pairs
from attnzoo.engines.native import library
from attnzoo.engines.softmax.softmax import Softmax
from attnzoo.engines.sparse.selected import selected_tiles
from attnzoo.engines.sparse.selected.selected_softmax import SelectedSoftmax
from attnzoo.engines.sparse.selected.selected_tokens import SelectedTokens
from attnzoo.engines.sparse.selected.selection import Placed
from attnzoo.registry import register
from attnzoo.variants.selected.index_choice import BlocksByIndex, TokensByIndex
from attnzoo.variants.selected.index_scores import INPUTS, Indexer, with_past


class _ByIndexer(Softmax):
    """What both engines of an indexer share: its inputs are checked, and its keys kept."""

    indexer: Indexer

    def completed(self, call: Call) -> Call:
        return self.indexer.checked(call)

    def with_past(self, call: Call, state: Any) -> tuple[Call, Any]:
        return with_past(self.indexer.checked(call), state)

    def cost(self, shape: Shape) -> Cost:
        found, more = super().cost(shape), self.indexer.state_elements(shape)
        skipped = found.skipped_macs
        if shape.is_causal and found.macs > skipped + found.support_macs:
            pairs = shape.query_length * shape.key_length
            each = self.indexer.macs(shape) // pairs  # of what stands behind a query, none is read
            skipped += each * (pairs - causal_pairs(shape.query_length, shape.key_length))
        return replace(
            found,
            skipped_macs=skipped,
            state_elements=found.state_elements + more,
            state_bytes=found.state_bytes + more * shape.dtype.itemsize,
            state_growth=found.state_growth + more // shape.key_length * shape.dtype.itemsize,
        )


class IndexedTokens(_ByIndexer, SelectedTokens):
    """Softmax over the keys that an indexer ranks highest."""

    def __init__(self, indexer: Indexer, top_k: int, scale: float | None) -> None:
        super().__init__(TokensByIndex(indexer, top_k), scale)
        self.indexer = indexer


class IndexedBlocks(_ByIndexer, SelectedSoftmax):
    """Softmax over the blocks that an indexer ranks highest.

    Before the backend `tiles` comes `native`: tiles of blocks that compiled code chooses, where it
    has been compiled.
    """

    selector: BlocksByIndex

    def __init__(self, indexer: Indexer, top_k: int, block_size: int, scale: float | None) -> None:
        super().__init__(BlocksByIndex(indexer, top_k, block_size), scale)
        self.indexer = indexer


def _chosen_natively(engine: IndexedBlocks, call: Call) -> Tensor:
    placed = Placed.of(call)
    selection = engine.selector.select_natively(placed)
    return selected_tiles.attend_in_tiles(engine, placed, selection, engine.selector.block_size)


def _native_why_not(engine: IndexedBlocks, call: Call) -> str | None:
    return (
        engine.selector.native_why_not(call)
        or selected_tiles.why_not(engine, call)
        or library.cannot_compile()
    )


def _native_passed_over(engine: IndexedBlocks, call: Call) -> str | None:
    return library.not_compiled()


_NATIVE = Backend("native", _chosen_natively, _native_why_not, untried=_native_passed_over)
_ROW, _, _DENSE, *_OTHERS = SelectedSoftmax.backends
IndexedBlocks.backends = (_ROW, _DENSE, _NATIVE, *_OTHERS)


@register
class Indexed(Attention):
    """DeepSeek sparse attention (DeepSeek-AI 2025, DeepSeek-V3.2, section 2.1, equations 1 and 2).

        I_ts = Σ_h w_th · ReLU(q^I_th · k^I_s)
        A_ts = exp(s_ts) / Σ_{l ∈ S(t)} exp(s_tl) if s ∈ S(t), else 0, S(t) = the top_k largest I_t

    A light indexer ranks the visible keys, all heads share its choice, and softmax is exact on it;
    a key that the indexer ranks low is lost in this layer. The indexer has few heads and small
    ones, so that its n² products are cheap. The choice is not differentiated: its inputs get no
    gradient from the output, and the indexer is trained by a loss of its own (`index_loss`).

    A call brings q_index (batch, index_heads, query_length, index_dim), k_index (batch, 1 or more,
    key_length, index_dim), of which consecutive index heads share one, and w_index (batch,
    index_heads, query_length). Only the order of the scores matters: the constants that models
    multiply them with (transformers: 1/√index_dim and 1/√index_heads) change nothing. Rotations and
    norms belong to what makes the inputs; DeepSeek-V3.2's indexer rotates halves, GLM's pairs. A
    `MultiheadAttention` that is told index_heads projects all three. Without them the heads of each
    key head choose by their own products, with weights of 1, which ranks well and saves nothing: a
    bound for what an indexer can find.

    Scores of exactly 0 are common with few index heads (ReLU): of equal scores the earlier key is
    taken, where torch.topk takes any.

    Single keys leave nothing to gather in matrix products: with block_size=1 the time is that of
    exact attention under a mask, and memory is linear. Of larger blocks only the chosen ones are
    multiplied, and compiled code, where there is any (`attnzoo doctor --compile`), chooses them in
    the cache. Decoding keeps every key and value, and index_dim numbers more of every token.

    top_k: keys that a query sees (DeepSeek-V3.2: 2,048)
    block_size: keys are taken in blocks of so many, top_k/block_size of those whose best visible
        key has the largest score; 1: one by one, as in DeepSeek-V3.2
    per_group: the heads of each key head choose for themselves, by an equal share of the index
        heads, as grouped-query models want it; else all heads share one choice
    index_heads: heads of the indexer; None: a call may bring any, or none
    index_dim: width of the indexer's heads; with index_heads head_dim by default
    scale: factor of the scores of keys, 1/sqrt(head_dim) by default
    """

    spec = Spec(
        name="indexed",
        title="Indexed attention (DeepSeek sparse attention)",
        paper="DeepSeek-AI, DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models, "
        "2025, arXiv:2512.02556",
        equation="A_ts = softmax of q_t·k_s/√d over the top_k s of largest Σ_h w_th·ReLU(q_th·k_s)",
        complexity="O(n²) light products, O(n·k) others, O(n·k) memory",
        family="sparse",
        exact=True,
        data_dependent=True,
        inputs=INPUTS,
    )
    engine: IndexedTokens | IndexedBlocks

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        top_k: int = 512,
        block_size: int = 1,
        per_group: bool = False,
        index_heads: int | None = None,
        index_dim: int | None = None,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        if check_positive("top_k", top_k) % check_positive("block_size", block_size):
            raise ValueError(
                f"top_k={top_k} is no multiple of block_size={block_size}; give as many keys as "
                "whole blocks have"
            )
        if index_heads is not None:
            check_positive("index_heads", index_heads)
            index_dim = check_positive("index_dim", head_dim if index_dim is None else index_dim)
        elif index_dim is not None:
            raise ValueError(f"index_dim={index_dim} is of no indexer; give index_heads, too")
        indexer = Indexer(index_heads, index_dim, check_flag("per_group", per_group))
        engine = (
            IndexedTokens(indexer, top_k, scale)
            if block_size == 1
            else IndexedBlocks(indexer, top_k, block_size, scale)
        )
        super().__init__(heads, head_dim, engine, backend=backend)
        if index_heads is not None and index_dim is not None:
            self.input_sizes = {
                "index_heads": index_heads,
                "index_key_heads": 1,
                "index_width": index_dim,
            }
