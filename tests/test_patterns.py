"""Which keys a query sees: windows and causality against xformers' masks, BigBird's random table by
its promises, patterns as sets."""

from __future__ import annotations

import pytest
import torch
from cases import Case, Situation, close, padding, tensors, with_backends
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnzoo
from attnzoo.call import Call
from attnzoo.engines.sparse.patterns.block_patterns import BlockUnion, GlobalBlocks, WindowBlocks
from attnzoo.engines.sparse.patterns.grid import Grid
from attnzoo.engines.sparse.patterns.pattern import Pattern
from attnzoo.engines.sparse.patterns.window import Window
from attnzoo.engines.sparse.sparse import Sparse
from attnzoo.oracles import standard
from attnzoo.oracles.bigbird import bigbird_global_blocks
from attnzoo.variants.bigbird.random_blocks import RandomBlocks

LENGTHS = [(1, 1), (65, 65), (5, 70), (1, 70), (70, 64), (200, 200)]


def xformers_bias(kind: str, window: int, lengths: tuple[int, int]) -> Tensor:
    """0 where xformers lets a query see a key, -inf elsewhere."""
    masks = pytest.importorskip(
        "xformers.ops.fmha.attn_bias",
        reason="xformers (extra `test`, Linux) is the oracle of this test",
        exc_type=ImportError,
    )
    if kind == "causal":
        mask = masks.LowerTriangularFromBottomRightMask()
    elif kind == "causal window":
        mask = masks.LowerTriangularFromBottomRightLocalAttentionMask(window)
    else:
        mask = masks.LocalAttentionFromBottomRightMask(
            window_left=window - 1, window_right=window - 1
        )
    return mask.materialize(lengths).double()


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", ["causal", "causal window", "window"])
@pytest.mark.parametrize("window", [1, 2, 16, 64])
def test_xformers_masks(kind: str, window: int, lengths: tuple[int, int]) -> None:
    """A and the output are softmax's under the mask that xformers materialises."""
    bias = xformers_bias(kind, window, lengths)
    case = Case("standard") if kind == "causal" else Case("sliding_window", {"window": window})
    q, k, v, _ = tensors(Situation(*lengths, kv_heads=4))
    scores = q @ k.mT * q.shape[-1] ** -0.5 + bias
    expected = torch.where(torch.isneginf(bias).all(-1, keepdim=True), 0.0, scores.softmax(-1))
    for _, backend in with_backends([case]):
        attn = case.build(dtype=torch.float64, prefer=backend)
        close(
            attn(q, k, v, is_causal=kind != "window"), expected @ v, 1e-10, f"output by {backend}"
        )
    close(attn.weights(q, k, is_causal=kind != "window"), expected, 1e-10, "A")


@settings(max_examples=60)
@given(window=st.integers(1, 80), query_length=st.integers(1, 80), key_length=st.integers(1, 80))
def test_xformers_windows_of_any_size(window: int, query_length: int, key_length: int) -> None:
    """The support of A alone."""
    lengths = (query_length, key_length)
    attn = Case("sliding_window", {"window": window}).build(1, 4, dtype=torch.float64)
    q, k, _, _ = tensors(Situation(*lengths, batch=1, heads=1, kv_heads=1), 4)
    for kind in ("causal window", "window"):
        support = attn.weights(q, k, is_causal=kind != "window")[0, 0] != 0
        assert torch.equal(support, xformers_bias(kind, window, lengths) == 0)


BIGBIRDS = [
    {"block_size": 4, "num_random_blocks": 3},
    {"block_size": 4, "num_random_blocks": 2, "num_window_blocks": 1, "num_global_blocks": 0},
    {"block_size": 4, "num_random_blocks": 5, "num_window_blocks": 5, "num_global_blocks": 3},
    {"block_size": 1, "num_random_blocks": 2, "num_global_blocks": 1},
    {"block_size": 4, "num_random_blocks": 0},
]
BIGBIRD = pytest.mark.parametrize("options", BIGBIRDS, ids=str)
DIRECTION = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


def check_table(
    table: Tensor, options: dict, query_length: int, key_length: int, is_causal: bool
) -> None:
    """Every row holds exactly as many distinct blocks as it asks for and there are, none of them a
    window, global or later block."""
    size = options["block_size"]
    side, wanted = (options.get("num_window_blocks", 3) - 1) // 2, options["num_random_blocks"]
    key_blocks, first = -(-key_length // size), (key_length - query_length) // size
    shown = bigbird_global_blocks(key_blocks, options.get("num_global_blocks", 2), is_causal)
    assert table.dtype == torch.int64
    assert table.shape == (4, (key_length - 1) // size - first + 1, wanted)
    for head in table.tolist():
        for row, drawn in enumerate(head):
            a = first + row
            free = {
                b
                for b in range(key_blocks)
                if abs(a - b) > side and b not in shown and (b < a or not is_causal)
            }
            real = [b for b in drawn if b != -1]
            assert len(set(real)) == len(real) == min(wanted, len(free)), (
                f"query block {a} drew {drawn} of {sorted(free)}"
            )
            assert set(real) <= free


@BIGBIRD
@DIRECTION
@pytest.mark.parametrize(
    "lengths",
    [(1, 1), (3, 3), (16, 16), (97, 97), (200, 200), (10, 97), (1, 98), (97, 10)],
    ids=str,
)
def test_random_table_takes_what_there_is(
    options: dict, is_causal: bool, lengths: tuple[int, int]
) -> None:
    attn = Case("bigbird", options).build()
    check_table(attn.random_blocks(*lengths, is_causal), options, *lengths, is_causal)  # type: ignore[operator]


@settings(max_examples=80)
@given(
    options=st.fixed_dictionaries(
        {
            "block_size": st.integers(1, 9),
            "num_random_blocks": st.integers(0, 6),
            "num_window_blocks": st.sampled_from([1, 3, 5, 7]),
            "num_global_blocks": st.integers(0, 6),
            "seed": st.integers(-5, 2**40),
        }
    ),
    lengths=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    is_causal=st.booleans(),
)
def test_random_table_of_any_shape(
    options: dict, lengths: tuple[int, int], is_causal: bool
) -> None:
    attn = Case("bigbird", options).build()
    check_table(attn.random_blocks(*lengths, is_causal), options, *lengths, is_causal)  # type: ignore[operator]


@BIGBIRD
@DIRECTION
def test_random_table_belongs_to_the_module(options: dict, is_causal: bool) -> None:
    """Same in train and eval and on the next call; another for every head and seed; and it travels
    in state_dict."""
    attn = Case("bigbird", options).build()
    other = Case("bigbird", options | {"seed": 1}).build()
    table = attn.train().random_blocks(200, 200, is_causal)  # type: ignore[operator]
    assert torch.equal(attn.eval().random_blocks(200, 200, is_causal), table)  # type: ignore[operator]
    if options["num_random_blocks"]:
        assert all(not torch.equal(table[h], table[g]) for h in range(4) for g in range(h))
        assert not torch.equal(other.random_blocks(200, 200, is_causal), table)  # type: ignore[operator]
    other.load_state_dict(attn.state_dict())
    assert torch.equal(other.random_blocks(200, 200, is_causal), table)  # type: ignore[operator]
    q, k, v, _ = (x.float() for x in tensors(Situation(200, 200)))
    assert torch.equal(other(q, k, v, is_causal=is_causal), attn(q, k, v, is_causal=is_causal))


@BIGBIRD
def test_random_table_stays_as_a_causal_sequence_grows(options: dict) -> None:
    attn = Case("bigbird", options).build()
    whole = attn.random_blocks(200, 200, True)  # type: ignore[operator]
    for n in (1, 4, 50, 128, 199):
        table = attn.random_blocks(n, n, True)  # type: ignore[operator]
        assert torch.equal(table, whole[:, : table.shape[1]])


@BIGBIRD
@DIRECTION
def test_random_table_of_the_last_queries(options: dict, is_causal: bool) -> None:
    """Rule 2: fewer queries than keys stand at the end, and keep the draw of their positions."""
    attn = Case("bigbird", options).build()
    whole = attn.random_blocks(97, 97, is_causal)  # type: ignore[operator]
    for n in (1, 2, 30, 96):
        table = attn.random_blocks(n, 97, is_causal)  # type: ignore[operator]
        assert torch.equal(table, whole[:, -table.shape[1] :])


@DIRECTION
def test_random_table_is_uniform(is_causal: bool) -> None:
    """Every free block, and every pair of them, is drawn equally often over heads, rows and seeds:
    within 5 standard deviations."""
    counts, pairs, draws = torch.zeros(24), torch.zeros(24, 24), 0
    for seed in range(40):
        options = {
            "block_size": 1,
            "num_random_blocks": 2,
            "num_window_blocks": 1,
            "num_global_blocks": 0,
            "seed": seed,
        }
        table = Case("bigbird", options).build(64).random_blocks(24, 24, is_causal)[:, 23]  # type: ignore[operator]
        for one in table.T:
            counts += torch.bincount(one, minlength=24)
        pairs.index_put_((table[:, 0], table[:, 1]), torch.ones(len(table)), accumulate=True)
        draws += len(table)
    for found, chance in (
        (counts[:23], 2 / 23),
        ((pairs + pairs.T)[:23, :23].triu(1), 2 / (23 * 22)),
    ):
        deviation = (draws * chance * (1 - chance)) ** 0.5
        off = (found - draws * chance).abs()
        assert off[found.ne(0)].max() < 5 * deviation
    assert int((pairs + pairs.T)[:23, :23].triu(1).ne(0).sum()) == 23 * 22 // 2


def test_random_rows_of_a_head_are_not_shifted_copies() -> None:
    """The hash mixes head, row and seed: no two (head, row) of neighbouring seeds draw alike more
    often than chance."""
    grid = Grid(heads=8, query_length=256, key_length=256, is_causal=False)
    nothing = WindowBlocks(1, 1)
    a, b = (RandomBlocks(1, 1, seed, nothing).key_blocks(grid)[..., 0] for seed in (0, 1))
    for left, right in (
        (a, b),
        (a[:, 1:], b[:, :-1]),
        (a[1:], a[:-1]),
        (a[:, 1:], a[:, :-1]),
        (a[1:], b[:-1]),
    ):
        alike = int((left == right).sum())
        expected = left.numel() / 255
        assert abs(alike - expected) < 5 * expected**0.5


def support(pattern: Pattern, grid: Grid) -> Tensor:
    return pattern.mask(grid).expand(grid.heads, -1, -1)


@DIRECTION
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_patterns_join_as_sets(lengths: tuple[int, int], is_causal: bool) -> None:
    grid = Grid(4, *lengths, is_causal)
    window, near, far = Window(5), WindowBlocks(3, 4), GlobalBlocks(2, 4)
    random = RandomBlocks(2, 4, 0, BlockUnion(near, far))
    for left in (window, near, far, random):
        for right in (window, near, far, random, GlobalBlocks(1, 3)):
            assert torch.equal(
                support(left | right, grid), support(left, grid) | support(right, grid)
            )
            assert torch.equal(
                support(left & right, grid), support(left, grid) & support(right, grid)
            )


def test_reach_of_joined_patterns() -> None:
    near, everywhere = Window(5), GlobalBlocks(1, 4)
    assert (near | Window(9)).reach == 9
    assert (near & Window(9)).reach == 5
    assert (near | everywhere).reach is None
    assert (near & everywhere).reach == 5


@DIRECTION
@pytest.mark.parametrize("kind", ["none", "interior"])
def test_a_pattern_of_ones_own(kind: str, is_causal: bool) -> None:
    """Any pattern runs: under a dense mask where the input is short, by the reference elsewhere."""
    pattern = Window(6) | GlobalBlocks(1, 5)
    engine = Sparse(pattern)
    q, k, v, _ = tensors(Situation(40, 40, kv_heads=4))
    mask = padding(kind, 2, 40)
    call = Call(q, k, v, mask, None, is_causal)
    out, backend, _ = engine(call)
    assert backend == "dense"
    allowed = pattern.mask(Grid(4, 40, 40, is_causal))
    if mask is not None:
        allowed = allowed & mask[:, None, None]
    if is_causal:
        allowed = allowed & torch.ones(40, 40, dtype=torch.bool).tril()
    expected, _ = standard(q, k, v, attn_mask=allowed)
    close(out, expected, 1e-12, "output")
    q, k, v, _ = (x.float() for x in tensors(Situation(520, 520, kv_heads=4)))
    call = Call(q, k, v, padding(kind, 2, 520), None, is_causal)
    assert engine(call)[1] == "reference"
    with pytest.raises(attnzoo.UnsupportedError, match="refuses this call: the pattern hides keys"):
        engine(call, "dense")


@DIRECTION
@pytest.mark.parametrize("kind", ["left", "right", "interior"])
def test_a_joined_pattern_counts_from_the_ends_of_its_samples(kind: str, is_causal: bool) -> None:
    engine = Sparse(Window(6) | GlobalBlocks(3, 5))
    q, k, v, _ = tensors(Situation(40, 40, kv_heads=4))
    call = Call(q, k, v, padding(kind, 2, 40), None, is_causal)
    close(engine(call, "dense")[0], engine(call, "reference")[0], 1e-12, "output")


WINDOWS = pytest.mark.parametrize("window", [1, 2, 5, 16])
SQUARE = Grid(heads=1, query_length=40, key_length=40, is_causal=False)


@WINDOWS
def test_windows_in_flash_attentions_words(window: int) -> None:
    """window_size=(left, right) sees the keys i - left .. i + right; xformers' local mask takes the
    same two numbers."""
    masks = pytest.importorskip(
        "xformers.ops.fmha.attn_bias",
        reason="xformers (extra `test`, Linux) is the oracle of this test",
        exc_type=ImportError,
    )
    pattern = Window(window)
    for is_causal in (False, True):
        left, right = pattern.to_flash_attention(is_causal)
        expected = (
            masks.LocalAttentionFromBottomRightMask(
                window_left=left, window_right=right
            ).materialize((40, 40))
            == 0
        )
        mask = pattern.mask(SQUARE)[0]
        assert torch.equal(mask.tril() if is_causal else mask, expected)
        assert Window.from_flash_attention(left, right) == pattern
    for left, right in ((-1, -1), (3, 2), (-1, 0), (0, 3)):
        with pytest.raises(ValueError, match=rf"window_size=\({left}, {right}\).*is_causal=True"):
            Window.from_flash_attention(left, right)


@WINDOWS
def test_windows_in_hugging_faces_words(window: int) -> None:
    """`sliding_window` of Mistral and its kin is `window` itself."""
    masks = pytest.importorskip(
        "transformers.masking_utils",
        reason="transformers (extra `models`) is the oracle of this test",
        exc_type=ImportError,
    )
    sees = masks.sliding_window_causal_mask_function(window)
    i, j = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    expected = sees(torch.tensor(0), torch.tensor(0), i, j)
    assert torch.equal(Window(window).mask(SQUARE)[0].tril(), expected)


@pytest.mark.parametrize("attention_window", [4, 8])
def test_windows_in_longformers_words(attention_window: int) -> None:
    """attention_window=2w is w keys on each side and the query's own: which queries of a real
    Longformer layer feel a change of one key."""
    longformer = pytest.importorskip(
        "transformers.models.longformer.modeling_longformer",
        reason="transformers (extra `models`)",
        exc_type=ImportError,
    )
    config = longformer.LongformerConfig(
        hidden_size=8,
        num_attention_heads=1,
        attention_window=[attention_window],
        attention_probs_dropout_prob=0.0,
    )
    layer = longformer.LongformerSelfAttention(config, layer_id=0).eval()
    hidden, nothing = torch.randn(1, 40, 8), torch.zeros(1, 40)
    changed = hidden.clone()
    changed[:, 20] += 1

    def run(x: Tensor) -> Tensor:
        return layer(
            x,
            attention_mask=nothing,
            is_index_masked=nothing.bool(),
            is_index_global_attn=nothing.bool(),
            is_global_attn=False,
        )[0]

    felt = (run(hidden) - run(changed)).abs().amax(-1)[0] > 1e-6
    pattern = Window.from_longformer(attention_window)
    assert torch.equal(felt, pattern.mask(SQUARE)[0, :, 20])
    assert pattern.to_longformer() == attention_window
    with pytest.raises(ValueError, match=f"attention_window={attention_window + 1} must be even"):
        Window.from_longformer(attention_window + 1)
    with pytest.raises(ValueError, match="window=1"):
        Window(1).to_longformer()


@pytest.mark.parametrize("is_causal", [False, True])
def test_windows_in_the_dialects_of_other_libraries(is_causal: bool) -> None:
    """flash-attn's (left, right) are the keys before and after; Longformer's attention_window is
    both sides together."""
    i, j = torch.arange(40)[:, None], torch.arange(40)
    for left in (0, 1, 7):
        right = 0 if is_causal else left
        window = Window.from_flash_attention(left, right)
        shown = window.mask(Grid(1, 40, 40, is_causal))[0]
        assert torch.equal(
            shown & (j <= i) if is_causal else shown, (j >= i - left) & (j <= i + right)
        )
        assert window.to_flash_attention(is_causal) == (left, right)
    for attention_window in (2, 8):
        window = Window.from_longformer(attention_window)
        assert torch.equal(
            window.mask(Grid(1, 40, 40, False))[0], (i - j).abs() <= attention_window // 2
        )
        assert window.to_longformer() == attention_window


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Window.from_flash_attention(-1, 0), r"\(-1, 0\)"),
        (lambda: Window.from_flash_attention(3, 2), r"\(3, 2\)"),
        (lambda: Window.from_longformer(7), "attention_window=7"),
        (lambda: Window(1).to_longformer(), "window=1"),
    ],
)
def test_windows_that_another_dialect_cannot_say(make, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
