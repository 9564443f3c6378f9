# pyright: reportMissingImports=false
"""How peers with a softmax are called: exact, over a window, over BigBird's blocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import peer_formulas as formulas
import torch
import torch.nn.functional as F
from peer_settings import BLOCK_SIZE, OURS, WINDOW, Given, Ready, width_of
from torch import Tensor

from attnzoo.benchmarking.plan import Cell
from attnzoo.engines.sparse.patterns.block_patterns import BlockPattern
from attnzoo.engines.sparse.patterns.grid import Grid
from attnzoo.engines.sparse.patterns.pattern import Pattern
from attnzoo.engines.sparse.patterns.window import Window


def our_pattern(group: str, cell: Cell) -> tuple[Pattern, Grid]:
    """The support of our variant at this setting."""
    engine: Any = OURS[group].build(cell.shape.heads, cell.shape.head_dim).engine
    return engine.pattern, Grid(cell.shape.heads, cell.length, cell.length, cell.is_causal)


def _support(group: str, cell: Cell) -> formulas.Visible:
    """Our pattern as a rule for some rows."""
    pattern, grid = our_pattern(group, cell)
    if isinstance(pattern, Window):
        return formulas.within(pattern.window - 1)
    assert isinstance(pattern, BlockPattern)
    seen = pattern.seen_blocks(grid)
    return lambda query, key: seen[:, query // BLOCK_SIZE, key // BLOCK_SIZE]


def dense_mask(group: str) -> Callable[[Cell], Ready]:
    """SDPA under our pattern laid out over n × n."""

    def make(cell: Cell) -> Ready:
        pattern, grid = our_pattern(group, cell)
        mask = pattern.mask(grid)
        if cell.is_causal:
            mask &= torch.ones(cell.length, cell.length, dtype=torch.bool).tril_()
        return Ready(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
            formulas.softmax_over(_support(group, cell)),
        )

    return make


def flex(group: str) -> Callable[[Cell], Ready]:
    """FlexAttention, compiled for this setting alone, with our pattern's blocks."""

    def make(cell: Cell) -> Ready:
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        pattern, grid = our_pattern(group, cell)
        is_window, table = isinstance(pattern, Window), pattern.table(grid)
        is_causal, window = cell.is_causal, WINDOW

        def near(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            distance = query - key
            return (
                (distance >= 0) & (distance < window)
                if is_causal
                else (distance < window) & (distance > -window)
            )

        def earlier(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return query >= key if is_causal else query >= 0

        mask = BlockMask.from_kv_blocks(
            *_listed(table.seen & ~table.whole),
            *_listed(table.whole),
            BLOCK_SIZE=pattern.table_block_size or BLOCK_SIZE,
            mask_mod=near if is_window else earlier,
            seq_lengths=(cell.length, cell.length),
        )
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        learns = cell.phase == "forward+backward"
        inputs = [
            torch.randn(1, cell.shape.heads, cell.length, cell.shape.head_dim, requires_grad=learns)
            for _ in range(3)
        ]
        started = time.perf_counter()
        with torch.set_grad_enabled(learns):
            compiled(inputs[0], inputs[1], inputs[2], block_mask=mask)
        spent = time.perf_counter() - started
        return Ready(
            lambda q, k, v: compiled(q, k, v, block_mask=mask),
            formulas.softmax_over(_support(group, cell)),
            compile_seconds=spent,
        )

    return make


def _listed(table: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and indices of a table of blocks, (heads or 1, query_blocks, key_blocks) bool, as
    BlockMask takes them."""
    numbers = table[None].int()
    return numbers.sum(-1).int(), numbers.argsort(dim=-1, descending=True, stable=True).int()


def x_transformers(flash: bool) -> Callable[[Cell], Ready]:
    def make(cell: Cell) -> Ready:
        from x_transformers.attend import Attend

        attend = Attend(causal=cell.is_causal, flash=flash)
        return Ready(lambda q, k, v: attend(q, k, v)[0], formulas.softmax_over())

    return make


def local_attention(cell: Cell) -> Ready:
    from local_attention import LocalAttention

    attend = LocalAttention(
        window_size=WINDOW // 2,
        causal=cell.is_causal,
        look_backward=2,
        look_forward=0 if cell.is_causal else 2,
        exact_windowsize=True,
        use_rotary_pos_emb=False,
    )
    return Ready(attend, formulas.softmax_over(formulas.within(WINDOW)))


def longformer(cell: Cell) -> Ready:
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=width_of(cell),
        num_attention_heads=cell.shape.heads,
        attention_window=[2 * WINDOW],
        attention_probs_dropout_prob=0.0,
    )
    module: Any = LongformerSelfAttention(config, 0).eval()
    module.query, module.key, module.value = Given(), Given(), Given()
    hidden, mask = torch.zeros(1, cell.length, width_of(cell)), torch.zeros(1, cell.length)
    nobody = torch.zeros(1, cell.length, dtype=torch.bool)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Q is scaled in place.
        module.query.value, module.key.value, module.value.value = (
            x.flatten(2).transpose(0, 1) for x in (q * 1, k, v)
        )
        return module(
            hidden,
            attention_mask=mask,
            is_index_masked=nobody,
            is_index_global_attn=nobody,
            is_global_attn=False,
        )[0]

    return Ready(forward, formulas.softmax_over(formulas.within(WINDOW)))


def huggingface_bigbird(cell: Cell) -> Ready:
    from transformers import BigBirdConfig, BigBirdModel
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

    config = BigBirdConfig(
        hidden_size=width_of(cell),
        num_attention_heads=cell.shape.heads,
        block_size=BLOCK_SIZE,
        num_random_blocks=3,
        max_position_embeddings=cell.length,
        attention_probs_dropout_prob=0.0,
    )
    # In evaluation mode it draws no random blocks.
    module: Any = BigBirdBlockSparseAttention(config, seed=0).train()
    module.query, module.key, module.value = Given(), Given(), Given()
    hidden = torch.zeros(1, cell.length, width_of(cell))
    blocked, band, rows, keys = BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(1, cell.length), BLOCK_SIZE
    )

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        module.query.value, module.key.value, module.value.value = q, k, v
        return module(hidden, band, rows, keys, blocked, blocked)[0]

    return Ready(forward, _over_blocks_attended(forward))


def _over_blocks_attended(forward: Callable[[Tensor, Tensor, Tensor], Tensor]) -> formulas.Formula:
    """Softmax over the key blocks that get any weight, each once. They are found by attending to
    values that mark the blocks."""

    def rows_of(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, is_causal: bool) -> Tensor:
        batch, heads, length, width = q.shape
        q_last, k_last = (x.float().transpose(1, 2).contiguous() for x in (q, k))
        masses = []
        marks = torch.eye(-(-length // BLOCK_SIZE)).repeat_interleave(BLOCK_SIZE, 0)[:length]
        for part in marks.split(width, 1):
            values = (
                F.pad(part, (0, width - part.shape[1]))[None, :, None]
                .expand(batch, -1, heads, -1)
                .contiguous()
            )
            masses.append(
                forward(q_last, k_last, values)
                .reshape(batch, length, heads, width)[:, rows, :, : part.shape[1]]
                .transpose(1, 2)
            )
        seen = torch.cat(masses, -1)[0] > 0
        return formulas.softmax_over(lambda query, key: seen[:, :, key[0] // BLOCK_SIZE])(
            q, k, v, rows, is_causal
        )

    return rows_of
