"""The contenders: our variant of each group, and the peers with how each is called through its public interface.

Packages are imported where a peer is made, so that a missing one costs only its own rows.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peer_formulas as formulas
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.bench.plan import Cell
from attnzoo.engines.sparse_flex import BLOCK, blocks_of_pattern, blocks_of_window
from attnzoo.fidelity.candidate import Candidate
from attnzoo.patterns import BlockPattern, Grid, Pattern, Window
from attnzoo.registry import build

WINDOW, BLOCK_SIZE, FEATURES, RANK, LANDMARKS = 256, 64, 256, 256, 256
CORE = "the attention alone"
PROJECTIONS_REPLACED = "the attention alone: its projections are replaced by modules that hand over q, k and v"

# Keys that a row sees at most: not causal, causal.
ALL = ("all", "all earlier ones")
OUR_WINDOW = ("511: |i - j| < 256", "256: 0 <= i - j < 256")
ONE_MORE = ("513: |i - j| <= 256", "257: 0 <= i - j <= 256")
BIGBIRD = ("512 in 8 distinct blocks of 64", "512 in up to 8 distinct blocks of 64")
OUR_KEYS = {"window": OUR_WINDOW, "bigbird": BIGBIRD}  # of the other groups: ALL

#: Our variant of each group's mathematics; None where the zoo has none.
OURS: dict[str, Candidate | None] = {
    "exact": Candidate("standard"),
    "window": Candidate("sliding_window", {"window": WINDOW}),
    "bigbird": Candidate("bigbird", {"block_size": BLOCK_SIZE, "num_window_blocks": 3, "num_global_blocks": 2, "num_random_blocks": 3}),
    "linear": Candidate("linear"),
    "efficient": Candidate("linear", {"feature_map": "softmax"}),
    "performer": Candidate("performer", {"num_features": FEATURES}),
    "linformer": Candidate("linformer", {"rank": RANK, "sharing": "headwise"}),
    "nystrom": None,
}


@dataclass(frozen=True)
class Ready:
    """A peer, built for one setting. forward: q, k, v in the peer's layout -> output; parameters: learned ones that take gradients."""

    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    formula: formulas.Formula | None
    parameters: tuple[Tensor, ...] = ()
    compile_seconds: float | None = None


@dataclass(frozen=True)
class Peer:
    """Another implementation. package: its distribution. causal: the forms that it has. heads_last: takes (batch, length, heads, head_dim).

    known: why its results are off its formula, or leak, said only where that is measured. keys: how many keys a row sees at most: not
    causal, causal.
    """

    group: str
    label: str
    package: str
    make: Callable[[Cell], Ready]
    causal: tuple[bool, ...] = (False, True)
    heads_last: bool = False
    includes: str = CORE
    keys: tuple[str, str] = ALL
    known: str = ""


class Given(nn.Module):
    """In the place of a projection: hands over what it was given, whatever comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Any = None

    def forward(self, x: Tensor) -> Any:
        return self.value


class Thirds(tuple[Tensor, ...]):
    """q, k and v where a module would cut one tensor in three."""

    def chunk(self, chunks: int, dim: int) -> tuple[Tensor, ...]:
        return self


def _width(cell: Cell) -> int:
    return cell.shape.heads * cell.shape.head_dim


def our_pattern(group: str, cell: Cell) -> tuple[Pattern, Grid]:
    """The support of our variant at this setting."""
    candidate = OURS[group]
    assert candidate is not None
    engine: Any = build(candidate.name, heads=cell.shape.heads, head_dim=cell.shape.head_dim, **candidate.options).engine
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
        return Ready(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), formulas.softmax_over(_support(group, cell)))

    return make


def flex(group: str) -> Callable[[Cell], Ready]:
    """FlexAttention, compiled for this setting alone, with our pattern's blocks."""

    def make(cell: Cell) -> Ready:
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        pattern, grid = our_pattern(group, cell)
        is_window = isinstance(pattern, Window)
        seen, whole = blocks_of_window(pattern, grid) if is_window else blocks_of_pattern(pattern, grid)
        is_causal, window = cell.is_causal, WINDOW

        def near(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            distance = query - key
            return (distance >= 0) & (distance < window) if is_causal else (distance < window) & (distance > -window)

        def earlier(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return query >= key if is_causal else query >= 0

        mask = BlockMask.from_kv_blocks(
            *_listed(seen & ~whole),
            *_listed(whole),
            BLOCK_SIZE=BLOCK if is_window else BLOCK_SIZE,
            mask_mod=near if is_window else earlier,
            seq_lengths=(cell.length, cell.length),
        )
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        learns = cell.phase == "forward+backward"
        inputs = [torch.randn(1, cell.shape.heads, cell.length, cell.shape.head_dim, requires_grad=learns) for _ in range(3)]
        started = time.perf_counter()
        with torch.set_grad_enabled(learns):
            compiled(*inputs, block_mask=mask)
        spent = time.perf_counter() - started
        return Ready(lambda q, k, v: compiled(q, k, v, block_mask=mask), formulas.softmax_over(_support(group, cell)), compile_seconds=spent)

    return make


def _listed(table: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and indices of a table of blocks, (heads or 1, query_blocks, key_blocks) bool, as BlockMask takes them."""
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
        hidden_size=_width(cell), num_attention_heads=cell.shape.heads, attention_window=[2 * WINDOW], attention_probs_dropout_prob=0.0
    )
    module = LongformerSelfAttention(config, 0).eval()
    module.query, module.key, module.value = Given(), Given(), Given()
    hidden, mask = torch.zeros(1, cell.length, _width(cell)), torch.zeros(1, cell.length)
    nobody = torch.zeros(1, cell.length, dtype=torch.bool)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        module.query.value, module.key.value, module.value.value = (x.flatten(2).transpose(0, 1) for x in (q * 1, k, v))  # q is scaled in place
        return module(hidden, attention_mask=mask, is_index_masked=nobody, is_index_global_attn=nobody, is_global_attn=False)[0]

    return Ready(forward, formulas.softmax_over(formulas.within(WINDOW)))


def huggingface_bigbird(cell: Cell) -> Ready:
    from transformers import BigBirdConfig, BigBirdModel
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

    config = BigBirdConfig(
        hidden_size=_width(cell),
        num_attention_heads=cell.shape.heads,
        block_size=BLOCK_SIZE,
        num_random_blocks=3,
        max_position_embeddings=cell.length,
        attention_probs_dropout_prob=0.0,
    )
    module = BigBirdBlockSparseAttention(config, seed=0).train()  # in evaluation mode it draws no random blocks
    module.query, module.key, module.value = Given(), Given(), Given()
    hidden = torch.zeros(1, cell.length, _width(cell))
    blocked, band, rows, keys = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, cell.length), BLOCK_SIZE)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        module.query.value, module.key.value, module.value.value = q, k, v
        return module(hidden, band, rows, keys, blocked, blocked)[0]

    return Ready(forward, _over_blocks_attended(forward))


def _over_blocks_attended(forward: Callable[[Tensor, Tensor, Tensor], Tensor]) -> formulas.Formula:
    """Softmax over the key blocks that get any weight, each once. They are found by attending to values that mark the blocks."""

    def rows_of(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, is_causal: bool) -> Tensor:
        batch, heads, length, width = q.shape
        q_last, k_last = (x.float().transpose(1, 2).contiguous() for x in (q, k))
        masses = []
        marks = torch.eye(-(-length // BLOCK_SIZE)).repeat_interleave(BLOCK_SIZE, 0)[:length]
        for part in marks.split(width, 1):
            values = F.pad(part, (0, width - part.shape[1]))[None, :, None].expand(batch, -1, heads, -1).contiguous()
            masses.append(forward(q_last, k_last, values).reshape(batch, length, heads, width)[:, rows, :, : part.shape[1]].transpose(1, 2))
        seen = torch.cat(masses, -1)[0] > 0
        return formulas.softmax_over(lambda query, key: seen[:, :, key[0] // BLOCK_SIZE])(q, k, v, rows, is_causal)

    return rows_of


def fast_transformers(cell: Cell) -> Ready:
    from fast_transformers.attention import CausalLinearAttention, LinearAttention
    from fast_transformers.masking import FullMask, LengthMask, TriangularCausalMask

    attend = (CausalLinearAttention if cell.is_causal else LinearAttention)(cell.shape.head_dim)
    mask = TriangularCausalMask(cell.length) if cell.is_causal else FullMask(cell.length)
    lengths = LengthMask(torch.tensor([cell.length]))
    return Ready(lambda q, k, v: attend(q, k, v, mask, lengths, lengths), formulas.kernel(formulas.elu_features, formulas.elu_features))


def fla_naive(cell: Cell) -> Ready:
    from fla.ops.linear_attn.naive import naive_chunk_linear_attn

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return naive_chunk_linear_attn(F.elu(q) + 1, F.elu(k) + 1, v, scale=1.0, normalize=True)

    return Ready(forward, formulas.kernel(formulas.elu_features, formulas.elu_features))


def linear_attention_transformer(cell: Cell) -> Ready:
    from linear_attention_transformer.linear_attention_transformer import causal_linear_attn, linear_attn

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

    module = LinformerSelfAttention(_width(cell), cell.length, k=RANK, heads=cell.shape.heads).eval()
    module.to_q, module.to_k, module.to_v, module.to_out = Given(), Given(), Given(), nn.Identity()
    hidden = torch.zeros(1, cell.length, _width(cell))

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        module.to_q.value, module.to_k.value, module.to_v.value = (x.flatten(2) for x in (q, k, v))
        return module(hidden)

    return Ready(forward, formulas.projected(module.proj_k.detach(), module.proj_v.detach()), (module.proj_k, module.proj_v))


def nystrom_attention(cell: Cell) -> Ready:
    from nystrom_attention import NystromAttention

    iterations = 6
    module = NystromAttention(
        _width(cell), cell.shape.head_dim, cell.shape.heads, num_landmarks=LANDMARKS, pinv_iterations=iterations, residual=False
    ).eval()
    module.to_qkv, module.to_out = Given(), nn.Identity()
    hidden = torch.zeros(1, cell.length, _width(cell))

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        module.to_qkv.value = Thirds(x.flatten(2) for x in (q, k, v))
        return module(hidden)

    return Ready(forward, formulas.nystrom(LANDMARKS, iterations))


WITHOUT_MASK = "the attention alone; its n × n mask is made before"

#: In the order in which they are let into a round: what takes quadratic time comes last, when room is left.
PEERS: tuple[Peer, ...] = (
    Peer("window", "local-attention", "local-attention", local_attention, keys=ONE_MORE),
    Peer(
        "window",
        "transformers Longformer",
        "transformers",
        longformer,
        causal=(False,),
        heads_last=True,
        includes=PROJECTIONS_REPLACED,
        keys=ONE_MORE,
    ),
    Peer(
        "window",
        "FlexAttention, window",
        "torch",
        flex("window"),
        includes="the attention alone, compiled; its block mask is made before",
        keys=OUR_WINDOW,
    ),
    Peer(
        "bigbird",
        "FlexAttention, bigbird",
        "torch",
        flex("bigbird"),
        includes="the attention alone, compiled; its block mask is made before",
        keys=BIGBIRD,
    ),
    Peer(
        "bigbird",
        "transformers BigBird",
        "transformers",
        huggingface_bigbird,
        causal=(False,),
        heads_last=True,
        includes=PROJECTIONS_REPLACED + "; it draws its random blocks anew in every pass",
        keys=("512 in 8 blocks of 64", ""),
        known="the formula counts every block once; a random block that is also a window block counts twice here",
    ),
    Peer("linear", "fast-transformers linear", "pytorch-fast-transformers", fast_transformers, heads_last=True),
    Peer(
        "linear",
        "fla naive chunk",
        "flash-linear-attention",
        fla_naive,
        causal=(True,),
        heads_last=True,
        includes="the attention and elu + 1 of q and k",
    ),
    Peer(
        "efficient",
        "linear-attention-transformer",
        "linear-attention-transformer",
        linear_attention_transformer,
        known="causal rows see only whole earlier buckets of 64 tokens, never their own token",
    ),
    Peer(
        "performer",
        "performer-pytorch",
        "performer-pytorch",
        performer_pytorch,
        known="1e-4 is added to every feature after a maximum over the whole length was taken out",
    ),
    Peer("linformer", "linformer", "linformer", linformer, causal=(False,), heads_last=True, includes=PROJECTIONS_REPLACED),
    Peer(
        "nystrom",
        "nystrom-attention",
        "nystrom-attention",
        nystrom_attention,
        causal=(False,),
        heads_last=True,
        includes=PROJECTIONS_REPLACED + "; without the convolution of the values",
        known="its pseudo-inverse starts from one scale for all heads, and six steps do not bring it to the end",
    ),
    Peer("exact", "x-transformers flash=True", "x-transformers", x_transformers(True)),
    Peer("window", "SDPA, dense window", "torch", dense_mask("window"), includes=WITHOUT_MASK, keys=OUR_WINDOW),
    Peer("bigbird", "SDPA, dense bigbird", "torch", dense_mask("bigbird"), includes=WITHOUT_MASK, keys=BIGBIRD),
    Peer("exact", "x-transformers", "x-transformers", x_transformers(False)),
)
