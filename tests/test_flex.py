"""FlexAttention's block tables against the patterns, entry by entry, and its numbers on the CPU
against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch._functorch.config as functorch
from cases import CASES, Case, Situation, close, tensors
from stages import in_turn
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import attnzoo
from attnzoo.call import Call
from attnzoo.eager import openly
from attnzoo.engines.softmax.distance_bias import DISTANCE_BIAS
from attnzoo.engines.softmax.reference import visible
from attnzoo.engines.sparse import flex
from attnzoo.engines.sparse.patterns.block_patterns import BlockUnion, GlobalBlocks, WindowBlocks
from attnzoo.engines.sparse.patterns.grid import grid_of
from attnzoo.engines.sparse.patterns.pattern import Pattern
from attnzoo.engines.sparse.patterns.window import Window
from attnzoo.engines.sparse.sparse import Sparse
from attnzoo.engines.sparse.windows.window_sparse import WindowSparse
from attnzoo.sequences.bad_slots import clear_padding
from attnzoo.sequences.padding import fills_slots
from attnzoo.variants.bigbird.random_blocks import RandomBlocks

BIGBIRD = BlockUnion(WindowBlocks(3, 4), GlobalBlocks(2, 4))
PATTERNS: list[Pattern] = [
    Window(1),
    Window(7),
    Window(130),
    Window(400),
    WindowBlocks(1, 3),
    WindowBlocks(5, 16),
    GlobalBlocks(3, 5),
    BIGBIRD | RandomBlocks(2, 4, 0, BIGBIRD),
]
SITUATIONS = [
    Situation(1, 1),
    Situation(65, 65),
    Situation(300, 300),
    Situation(256, 256),
    Situation(65, 18),
    Situation(9, 65),
    Situation(150, 290),
]
EVERY = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
CAUSAL = pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
NO_TABLES = {"sinks", "sink_logits", "global_tokens"}
SPARSE = [
    case
    for name in ("sliding_window", "bigbird", "longformer")
    for case in CASES[name]
    if not NO_TABLES & set(case.options)
]
DILATED = [
    Window(5, dilation=3),
    Window(70, dilation=2),
    Window(1, dilation=4),
    Window(9, dilation=(1, 2, 5, 2)),
]


def call_of(situation: Situation, is_causal: bool, dtype: torch.dtype = torch.float32) -> Call:
    q, k, v, _ = (x.to(dtype) for x in tensors(situation, 16))
    return clear_padding(Call(q, k, v, situation.key_mask(), None, is_causal))


def tables_of(mask: BlockMask, heads: int) -> tuple[Tensor, Tensor]:
    """Blocks that ask mask_mod, and whole ones, (heads, query_blocks, key_blocks) bool, by reading
    the tables as the kernel does."""

    def read(counts: Tensor | None, indices: Tensor | None) -> Tensor:
        found = torch.zeros_like(mask.kv_indices[0], dtype=torch.bool)
        if counts is None or indices is None:
            return found.expand(heads, -1, -1)
        for head, row in torch.cartesian_prod(
            torch.arange(counts.shape[1]), torch.arange(counts.shape[2])
        ).tolist():
            found[head, row, indices[0, head, row, : int(counts[0, head, row])].long()] = True
        return found.expand(heads, -1, -1)

    return read(mask.kv_num_blocks, mask.kv_indices), read(
        mask.full_kv_num_blocks, mask.full_kv_indices
    )


def entries(mask: BlockMask, heads: int, batch: int) -> Tensor:
    """What the kernel lets through, (batch, heads, rows, keys): all of a whole block, and what
    mask_mod says in the others."""
    rows, keys = mask.seq_lengths
    block = mask.BLOCK_SIZE[0]
    some, whole = (
        x.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :rows, :keys]
        for x in tables_of(mask, heads)
    )
    grid = torch.meshgrid(
        torch.arange(batch),
        torch.arange(heads),
        torch.arange(rows),
        torch.arange(keys),
        indexing="ij",
    )
    return whole | (some & mask.mask_mod(*grid))


@EVERY
@CAUSAL
@pytest.mark.parametrize("padding", ["none", "interior", "whole"])
def test_entries_are_those_of_the_pattern(pattern: Pattern, is_causal: bool, padding: str) -> None:
    for lengths in SITUATIONS:
        situation = Situation(lengths.query_length, lengths.key_length, padding)
        call = call_of(situation, is_causal)
        grid = grid_of(call)
        mask, tables = flex.block_mask(pattern, call)
        ahead = tables.ahead
        found = entries(mask, 4, 2)[:, :, ahead:]
        expected = pattern.mask(grid)[None].expand_as(found)
        masks = visible(call)
        assert torch.equal(found, expected if masks is None else expected & masks), str(situation)


@CAUSAL
@pytest.mark.parametrize("window", [1, 7, 130])
def test_entries_of_packed_rows(window: int, is_causal: bool) -> None:
    """Where the ids cannot be read, which are those of a graph, mask_mod keeps the pieces apart."""
    for lengths in (Situation(300, 300), Situation(150, 290, "interior")):
        call = call_of(lengths, is_causal)
        ids = (torch.rand(2, lengths.key_length) < 0.05).cumsum(1) - 3
        call = replace(call, segments=ids)
        mask, tables = flex.block_mask(Window(window), call)
        ahead = tables.ahead
        found, seen = entries(mask, 4, 2)[:, :, ahead:], visible(call)
        assert seen is not None
        assert torch.equal(found, Window(window).mask(grid_of(call))[None] & seen.expand_as(found))


def test_only_what_counts_no_positions_packs() -> None:
    """A dilated window's residue classes would cross pieces, and BigBird counts from their
    starts."""
    call = replace(call_of(Situation(300, 300), True), segments=torch.zeros(2, 300).long())
    reasons = {}
    for name, options in (
        ("sliding_window", {"window": 9}),
        ("sliding_window", {"window": 9, "dilation": 2}),
        ("bigbird", {"block_size": 32}),
    ):
        engine = attnzoo.build(name, heads=4, head_dim=16, **options).engine
        (backend,) = [one for one in engine.backends if one.name == "flex"]
        with patch.object(flex, "why_not", lambda *_: None):
            reasons[name, "dilation" in options] = backend.reason(engine, call, by_name=True)
    assert reasons["sliding_window", False] is None
    assert "residue classes" in str(reasons["sliding_window", True])
    assert "packed row" in str(reasons["bigbird", False])


@pytest.mark.parametrize("name", ["sliding_window", "bigbird"])
def test_auto_takes_it_where_it_does_not_refuse(name: str) -> None:
    """On CUDA it is first, but for calls in which the pattern hides nothing; and of those, but for
    what has not run on a GPU, which it takes when asked for by name."""
    engine = attnzoo.build(name, heads=4, head_dim=16).engine
    plain, short = (
        call_of(Situation(length, length, kv_heads=4), True, torch.bfloat16) for length in (700, 60)
    )
    with (
        patch.object(flex, "why_not", lambda *_: None),
        patch.object(flex, "_on_cpu", lambda _: False),
    ):
        assert engine.choose(plain, "auto").name == "flex"
        assert engine.choose(short, "auto").name == "dense"
        for untried in (
            replace(plain, q=plain.q.clone().requires_grad_()),
            replace(plain, q=plain.q.float(), k=plain.k.float(), v=plain.v.float()),
            replace(plain, k=plain.k[:, :2], v=plain.v[:, :2]),
            replace(plain, key_mask=torch.ones(2, 700, dtype=torch.bool)),
            plain.giving(DISTANCE_BIAS, torch.zeros(4, 1401)),
        ):
            assert engine.choose(untried, "auto").name != "flex"
            assert engine.choose(untried, "flex").name == "flex"
        with patch.object(engine, "softcap", 5.0):
            assert engine.choose(plain, "auto").name != "flex"
    assert engine.choose(plain, "auto").name != "flex"


def test_it_is_kept_out_of_what_cannot_hold_it() -> None:
    """A second derivative, a transform, and, where its backward kernel must be searched for, a
    compiled graph."""
    call, reasons = call_of(Situation(200, 200), True), {}

    def ask(name: str, call: Call, block_size: int = 128) -> None:
        reasons[name] = flex._unseen(call, block_size)

    ask("plain", call)
    with openly():
        ask("again", call)
    torch.func.vmap(lambda q: (ask("vmap", replace(call, q=q)), q)[1])(call.q)
    learning = replace(call, q=call.q.clone().requires_grad_())
    ask("learns", learning, 32)
    with patch.object(torch.compiler, "is_compiling", lambda: True):
        ask("graph", learning)
        ask("small graph", learning, 32)
        ask("small graph, evaluated", call, 32)
        with patch.object(torch.compiler, "is_exporting", lambda: True):
            ask("export", call)
    refused = {name for name, reason in reasons.items() if reason}
    assert refused == {"again", "vmap", "small graph", "export"}, reasons
    assert "block_size=32" in str(reasons["small graph"])


@EVERY
@CAUSAL
def test_no_block_is_listed_in_vain(pattern: Pattern, is_causal: bool) -> None:
    """Every listed block of keys holds a visible one for some query, no block is listed twice, and
    all that could be whole are."""
    for situation in SITUATIONS:
        call = call_of(situation, is_causal)
        grid = grid_of(call)
        mask, tables = flex.block_mask(pattern, call)
        ahead = tables.ahead
        some, whole = tables_of(mask, 4)
        assert not (some & whole).any()
        block = mask.BLOCK_SIZE[0]
        dense = pattern.mask(grid).expand(4, -1, -1)
        if is_causal:
            dense = dense & torch.ones(dense.shape[1:], dtype=torch.bool).tril(grid.offset)
        after = (
            some.shape[1] * block - ahead - grid.query_length,
            some.shape[2] * block - grid.key_length,
        )
        touched = torch.nn.functional.pad(dense, (0, after[1], ahead, after[0]))
        touched = touched.unflatten(1, (-1, block)).unflatten(3, (-1, block)).any(4).any(2)
        assert torch.equal(some | whole, touched), str(situation)
        filled = torch.nn.functional.pad(dense, (0, after[1])).float()
        filled = (
            torch.nn.functional.pad(filled, (0, 0, ahead, after[0]), value=1.0)
            .unflatten(1, (-1, block))
            .unflatten(3, (-1, block))
            .amin((2, 4))
        )
        could = touched & (filled > 0)
        assert not (whole & ~could).any(), str(situation)
        if (
            ahead == 0
            # Else the first, cut block of rows may see all of its diagonal block, and asks mask_mod
            # all the same
        ):
            assert torch.equal(whole, could), str(situation)


@EVERY
@CAUSAL
def test_the_backward_tables_are_the_transposed_ones(pattern: Pattern, is_causal: bool) -> None:
    call = call_of(Situation(150, 290), is_causal)
    mask, _ = flex.block_mask(pattern, call)
    some, whole = tables_of(mask, 4)
    for table, counts, indices in (
        (some, mask.q_num_blocks, mask.q_indices),
        (whole, mask.full_q_num_blocks, mask.full_q_indices),
    ):
        assert counts is not None and indices is not None
        listed = torch.zeros_like(indices[0], dtype=torch.bool)
        for head, column in torch.cartesian_prod(
            torch.arange(counts.shape[1]), torch.arange(counts.shape[2])
        ).tolist():
            listed[
                head, column, indices[0, head, column, : int(counts[0, head, column])].long()
            ] = True
        assert torch.equal(listed.expand(4, -1, -1).mT, table)


@pytest.mark.parametrize(
    ("pattern", "is_causal", "padding"),
    in_turn(
        [(pattern, is_causal) for pattern in DILATED for is_causal in (False, True)],
        ["none", "interior", "whole"],
    ),
)
def test_entries_of_dilated_windows(pattern: Window, is_causal: bool, padding: str) -> None:
    """A dilated window has tables for each of its residue classes, so its entries are read off A
    itself: A·I."""
    engine = WindowSparse(pattern).eval()
    whole = [one for one in SITUATIONS if one.key_length != 256]  # 300 keys have whole blocks too
    for lengths in whole if padding == "none" else SITUATIONS[-3:]:
        batch = 1 if padding == "none" else 2
        situation = Situation(lengths.query_length, lengths.key_length, padding, batch)
        call = call_of(situation, is_causal)
        grid = grid_of(call)
        identity = torch.eye(grid.key_length).expand(*call.v.shape[:2], -1, -1)
        with torch.no_grad():
            found = by(_with_tables, engine, replace(call, v=identity))
        masks, expected = visible(call), pattern.mask(grid)[None].expand_as(found)
        assert torch.equal(found > 0, expected if masks is None else expected & masks), str(
            situation
        )


def numbers(
    case: Case,
    situation: Situation,
    is_causal: bool,
    *,
    compiled: bool,
    bias: Tensor | None = None,
) -> None:
    """flex on the CPU against the reference. Uncompiled it reads mask_mod alone, so the tables are
    given to it there as a mask."""
    call = call_of(situation, is_causal)
    if bias is not None:
        call = call.giving(DISTANCE_BIAS, bias)
    attn = case.build(situation.heads, 16).eval()
    engine = attn.engine
    assert isinstance(engine, Sparse)
    if engine.pattern.tied_to_end and not is_causal and not fills_slots(call.key_mask):
        return  # which the backend refuses
    # The C++ of dynamic lengths does not compile everywhere (torch 2.13), so here each length has
    # its own.
    kernel = (
        torch.compile(flex_attention, dynamic=False, fullgraph=True) if compiled else _with_tables
    )
    with torch.no_grad():
        out = by(kernel, engine, call)
        expected, _, _ = engine(call, "reference")
    close(out, expected, 2e-6, f"{case} {situation}")
    blind = expected.abs().sum(-1) == 0
    assert not out[blind].any(), "an empty row is not 0"


def by(kernel: Callable[..., Any], engine: Sparse, call: Call) -> Tensor:
    """A·v by the engine's backend `flex`, whose kernel is another."""
    (backend,) = [one for one in engine.backends if one.name == "flex"]
    with patch.object(flex, "_compiled", lambda *_: kernel):
        return backend.run(engine, call)


def _with_tables(
    q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask, **options: object
) -> Tensor:
    seen = entries(block_mask, q.shape[1], q.shape[0])
    block_mask.mask_mod = lambda b, h, i, j: seen[b, h, i, j]
    return flex_attention(q, k, v, block_mask=block_mask, **options)  # pyright: ignore[reportArgumentType, reportReturnType, reportCallIssue]


NUMBERS = [
    Situation(63, 63, kv_heads=1),
    Situation(300, 300, "interior", batch=1),
    Situation(65, 65, "whole"),
    Situation(65, 65, "interior"),
    Situation(150, 290, "left", batch=1),
    Situation(65, 18),
]


@pytest.mark.parametrize(
    ("case", "is_causal", "situation"),
    in_turn([(case, is_causal) for case in SPARSE for is_causal in (False, True)], NUMBERS),
)
def test_numbers(case: Case, is_causal: bool, situation: Situation) -> None:
    numbers(case, situation, is_causal, compiled=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case("sliding_window", {"window": 50}),
        Case("bigbird", {"block_size": 32, "num_random_blocks": 2}),
    ],
    ids=str,
)
@CAUSAL
def test_numbers_compiled(case: Case, is_causal: bool) -> None:
    """The compiled CPU kernel walks the tables as the CUDA one does."""
    for situation in (Situation(300, 300), Situation(150, 290, "left")):
        numbers(case, situation, is_causal, compiled=True)


@pytest.mark.parametrize(
    ("case", "is_causal"),
    in_turn(
        [
            Case("sliding_window", {"window": 9}),
            Case("sliding_window", {"window": 20, "softcap": 2.0}),
            Case("sliding_window", {"window": 9, "dilation": 2}),
            Case("bigbird", {"block_size": 8, "num_random_blocks": 1}),
        ],
        [False, True],
    ),
)
def test_biases_by_distance(case: Case, is_causal: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    bias = torch.randn(4, 2 * 300 + 1, generator=generator)
    for situation in NUMBERS[2:5]:
        numbers(case, situation, is_causal, compiled=False, bias=bias)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lengths",
    [[(300, 300), (400, 400), (777, 777)], [(300, 520), (400, 777), (1000, 900)]],
    ids=["square", "cross"],
)
def test_lengths_do_not_compile_anew(lengths: list[tuple[int, int]]) -> None:
    """One graph for a shape class, whatever the lengths, their difference, the window and the
    padding's content."""
    torch._dynamo.reset()
    counter = CompileCounter()
    kernel = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=counter)
    for window, (query_length, key_length) in enumerate(lengths, 50):
        engine = WindowSparse(Window(window)).eval()
        call = call_of(Situation(query_length, key_length, "interior"), True)
        with torch.no_grad():
            by(kernel, engine, call)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("block_size", "tile"), [(128, 128), (64, 64), (96, 32), (256, 128), (32, 32)]
)
def test_largest_tile(block_size: int, tile: int) -> None:
    assert flex.largest_tile(block_size) == tile


@pytest.mark.parametrize(
    ("pattern", "padding", "dtype", "options"),
    [
        (Window(100), "none", torch.bfloat16, None),
        (Window(100), "left", torch.bfloat16, {"fwd_BLOCK_N": 64}),
        (Window(100), "left", torch.float32, {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 32}),
        (WindowBlocks(3, 64), "left", torch.bfloat16, {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64}),
        (WindowBlocks(3, 128), "left", torch.float16, {"fwd_BLOCK_N": 64}),
    ],
)
def test_tiles_divide_the_blocks_and_spill_nothing(
    pattern: Pattern, padding: str, dtype: torch.dtype, options: dict[str, int] | None
) -> None:
    """What a kernel of these tiles needs on sm_90a is in benchmarks/results/sm90_compiled.jsonl."""
    call = call_of(Situation(256, 256, padding), True, dtype)
    assert flex.kernel_options(pattern, call) is None  # those are CUDA's
    with patch.object(flex, "_on_cpu", lambda _: False):
        assert flex.kernel_options(pattern, call) == options


def test_on_a_cpu_it_is_for_those_who_ask_for_it_and_do_not_train() -> None:
    engine = attnzoo.build("sliding_window", heads=4, head_dim=16, window=9).engine
    call = call_of(Situation(700, 700), True)
    (backend,) = [one for one in engine.backends if one.name == "flex"]
    assert backend.reason(engine, call, by_name=True) is None
    assert "on a CPU it is slower" in str(backend.reason(engine, call, by_name=False))
    learns = replace(call, q=call.q.clone().requires_grad_())
    assert "no backward pass on a CPU" in str(backend.reason(engine, learns, by_name=True))


@pytest.mark.slow
def test_the_backend_itself_on_a_cpu() -> None:
    """Two lengths, each compiled."""
    attn = attnzoo.build("sliding_window", heads=4, head_dim=16, window=50, backend="flex")
    for length in (300, 430):
        call = call_of(Situation(length, length), True)
        with torch.no_grad():
            out = attn(call.q, call.k, call.v, is_causal=True)
        attn.backend = "reference"
        close(out, attn(call.q, call.k, call.v, is_causal=True), 2e-6, f"{length} tokens")
        attn.backend = "flex"


def test_it_is_compiled_for_many_shapes_and_for_more_than_one_backward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a compiler of FlexAttention is told, seen from where it would run."""
    seen: list[tuple[bool, int]] = []
    dynamo = torch._dynamo.config

    def compiling(*_: Any, **__: Any) -> Callable[..., None]:
        return lambda: seen.append((functorch.donated_buffer, dynamo.recompile_limit))

    monkeypatch.setattr(torch, "compile", compiling)
    before = (functorch.donated_buffer, dynamo.recompile_limit)
    flex.compiled_flex.__wrapped__(False)()
    assert seen == [(False, flex.SHAPE_CLASSES)]
    assert (functorch.donated_buffer, dynamo.recompile_limit) == before != seen[0]


def test_it_never_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers would be wrong then: the tables of blocks are for the kernel alone."""
    call = call_of(Situation(200, 200), True)
    with torch.compiler.set_stance("force_eager"):
        assert "torch.compile is off" in str(flex._unseen(call, 128))
    with torch._dynamo.config.patch(disable=True):
        assert "torch.compile is off" in str(flex._unseen(call, 128))
    assert flex._unseen(call, 128) is None
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)
    with pytest.raises(RuntimeError, match="switched off: switch it on"):
        flex.compiled_flex.__wrapped__(False)(call.q, call.k, call.v)


@pytest.mark.slow
def test_what_is_compiled_reads_the_tables() -> None:
    """By the function that CUDA runs, on the CPU, which has the forward pass."""
    engine = attnzoo.build("bigbird", heads=4, head_dim=16, block_size=32).engine
    assert isinstance(engine, Sparse)
    call = call_of(Situation(300, 300), True)
    kernel = torch.compile(flex._only_compiled, dynamic=False, fullgraph=True)
    with torch.no_grad():
        close(by(kernel, engine, call), engine(call, "reference")[0], 2e-6, "rows")
