"""Where the article stops: limits, rooflines, crossovers and paths, and the command that prints
them."""

from __future__ import annotations

import csv
import json
import re
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import of_each_folder
from stages import staged, thorough

import attnzoo
from attnzoo.commands.program import main
from attnzoo.cost import article
from attnzoo.cost.hardware import GPU, find_gpu, gpu_presets, roofline
from attnzoo.cost.layer_costs import COUNTED_LENGTH, CountedVariant, whole_zoo
from attnzoo.cost.limits import (
    ACCOUNTS,
    cache_bytes,
    crossover,
    decoding_roofline,
    flash_bytes,
    input_bytes,
    longest,
)
from attnzoo.cost.model_sizes import TransformerModel, find_model, model_presets
from attnzoo.cost.path_lengths import known_path, longest_path, support
from attnzoo.registry import Choice, names
from attnzoo.report.scaling.latent_table import latent_costs
from attnzoo.report.scaling.scaling_figures import drawings
from attnzoo.report.scaling.scaling_report import Scaling, scaling
from attnzoo.report.scaling.settings import Settings
from attnzoo.report.scaling.variant_tables import variant_limits

MODELS, GPUS = model_presets(), gpu_presets()
TINY = TransformerModel("tiny", d=64, heads=4, kv_heads=2, layers=2)
ZOO = whole_zoo(TINY)[0]
OPTIONED = [
    CountedVariant(Choice("sliding_window", {"window": 1}), TINY),
    CountedVariant(Choice("sliding_window", {"window": 3}), TINY),
    CountedVariant(
        Choice("bigbird", {"block_size": 8, "num_random_blocks": 0, "num_global_blocks": 0}), TINY
    ),
    CountedVariant(
        Choice("bigbird", {"block_size": 8, "num_random_blocks": 1, "num_global_blocks": 0}), TINY
    ),
    CountedVariant(
        Choice("bigbird", {"block_size": 8, "num_random_blocks": 1, "num_global_blocks": 2}), TINY
    ),
    CountedVariant(
        Choice(
            "bigbird",
            {
                "block_size": 8,
                "num_random_blocks": 1,
                "num_window_blocks": 1,
                "num_global_blocks": 1,
            },
        ),
        TINY,
    ),
]
EVERY_WAY = [
    (variant, way) for variant in ZOO + OPTIONED for way in (False, True) if variant.runs(way)
]
WAYS = [pytest.param(*one, id=f"{one[0].label}-{one[1]}") for one in EVERY_WAY]


@pytest.fixture(scope="module")
def found() -> Scaling:
    return scaling(Settings(TINY, GPUS["rtx-3090"], length=2048), MODELS, GPUS)


# ---- memory --------------------------------------------------------------------------------------


def account(name: str) -> Callable[[TransformerModel, int], int]:
    return next(account.bytes_at for account in ACCOUNTS if account.name == name)


def test_the_articles_accounts_are_among_ours():
    model, budget = MODELS["gpt2"], 24e9 * 0.7
    assert (
        longest(partial(account("matrices"), model), budget)
        == article.longest_matrices(model, 24e9)
        == 7637
    )
    (row,) = article.attention_memory([model], [2048]).rows
    assert account("stored")(model, 2048) / article.GIB == row["gib"]


@pytest.mark.parametrize("name", ["gpt2", "llama-3-8b"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_standard_keeps_what_flash_attention_keeps(name: str, is_causal: bool):
    """The formula against autograd: q, k, v, the output and one fp32 statistic a query, with few
    key heads and many."""
    model = MODELS[name]
    variant = CountedVariant(Choice("standard"), model)
    assert variant.kept_bytes(1000, is_causal) == pytest.approx(flash_bytes(model, 1000), rel=1e-3)
    assert variant.kept_bytes(100_000, is_causal) == pytest.approx(
        flash_bytes(model, 100_000), rel=1e-3
    )


@pytest.mark.parametrize(
    ("variant", "is_causal"),
    [
        staged(variant, way, first=variant.choice.name in of_each_folder()[::2])
        for variant, way in EVERY_WAY
    ],
)
def test_what_is_kept_beyond_counting_lies_on_the_line(variant: CountedVariant, is_causal: bool):
    """Within 5% of the count where blocks are whole. A ragged end costs up to a block of some
    tensors, and joining it a copy of one, which the line leaves out where windows are of one
    token."""
    for n in (1, 100):
        counted = variant._counted(n, is_causal)
        assert variant.kept_bytes(n, is_causal) == counted > 0
    assert variant.known_length(is_causal, 2**20) == 2**20
    if variant.choice.name in ("flash", "path"):  # tile by tile, in seconds
        return
    lengths = {3 * COUNTED_LENGTH: 0.05, 2 * COUNTED_LENGTH + 1: 0.05}
    if variant.choice.options.get("window") == 1:
        lengths[2 * COUNTED_LENGTH + 1] = 0.35
    for n, tolerance in lengths.items():
        counted = variant._counted(n, is_causal)
        assert variant.kept_bytes(n, is_causal) == pytest.approx(counted, rel=tolerance)


def test_what_grows_faster_is_known_as_far_as_it_is_counted():
    choice = Choice("standard", {"backend": "reference"})
    variant = CountedVariant(choice, MODELS["smollm2-135m"])
    assert variant.kept_bytes(64, True) and variant.kept_bytes(4097, True) is None
    row = variant_limits(
        Settings(MODELS["smollm2-135m"], GPUS["h100"], is_causal=True), [variant]
    ).rows[0]
    assert variant.known_length(True, 2**20) == COUNTED_LENGTH
    assert row["checkpointed"] == "> 4,096"


@thorough
@pytest.mark.parametrize(
    ("name", "is_causal"), [("llama-3-8b", True), ("smollm2-135m", True), ("gpt2", False)]
)
def test_the_longest_sequence_fits_and_the_next_does_not(name: str, is_causal: bool):
    """Of every variant, in training and with checkpointing, by its cost in whole numbers."""
    model, gpu = MODELS[name], GPUS["a100-80gb"]
    settings, variants = Settings(model, gpu, is_causal=is_causal), whole_zoo(model)[0]
    budget = gpu.memory_bytes * settings.share
    for variant, row in zip(variants, variant_limits(settings, variants).rows, strict=True):
        if not variant.runs(is_causal):
            continue

        def kept(n: int, variant: CountedVariant = variant) -> int:
            return variant.kept_bytes(n, is_causal) or 0

        whole = {
            "training": lambda n: model.layers * kept(n),
            "checkpointed": lambda n: model.layers * input_bytes(model, n) + kept(n),
        }
        for column, bytes_at in whole.items():
            found = row[column]
            if isinstance(found, str):  # the longest that is counted, or known to grow so
                assert found in ("> 1,048,576", "> 4,096"), (variant.label, found)
                assert bytes_at(int(found[2:].replace(",", ""))) <= budget, variant.label
            else:
                assert bytes_at(found) <= budget < bytes_at(found + 1), (variant.label, found)


def test_state_of_standard_is_the_cache():
    for model in MODELS.values():
        assert model.layers * (
            CountedVariant(Choice("standard"), model).state_bytes(1000) or 0
        ) == cache_bytes(model, 1000)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("gpt2", 124.4),
        ("gpt2-medium", 354.8),
        ("gpt2-large", 774.0),
        ("gpt2-xl", 1557.6),
        ("llama-3-8b", 8030.3),
        ("smollm2-135m", 134.5),
    ],
)
def test_parameters_are_the_released_models(name: str, millions: float):
    assert MODELS[name].parameters / 1e6 == pytest.approx(millions, rel=0.01)


@given(st.integers(0, 10**6), st.integers(1, 10**4), st.integers(0, 50), st.integers(0, 10**10))
def test_longest_is_the_largest_that_fits(constant: int, slope: int, square: int, budget: int):
    def bytes_at(n: int) -> int:
        return constant + slope * n + square * n * n

    n = longest(bytes_at, budget, limit=2**30)
    if n is None:
        assert bytes_at(2**30) <= budget
    else:
        assert bytes_at(n + 1) > budget
        assert n == 0 or bytes_at(n) <= budget


# ---- time and crossovers
# -----------------------------------------------------------------------------------------------


def test_roofline_by_hand():
    gpu = GPU("toy", memory_gb=1, tflops=2, bandwidth_gb=10)
    slow = roofline(macs=10**12, moved_bytes=10**9, gpu=gpu)
    assert (slow.compute_seconds, slow.memory_seconds, slow.seconds, slow.bound) == (
        1.0,
        0.1,
        1.0,
        "compute",
    )
    assert roofline(macs=10**9, moved_bytes=10**9, gpu=gpu).bound == "bandwidth"


def test_decoding_reads_all_weights_and_the_cache():
    model, gpu = MODELS["llama-3-8b"], GPUS["h100"]
    seconds = decoding_roofline(model, 8192, gpu).seconds
    assert seconds == pytest.approx((2 * model.parameters + 8192 * 32 * 2 * 8 * 128 * 2) / 3350e9)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_crossover_of_a_line_and_a_parabola(slope: int, square: int):
    found = crossover(lambda n: slope * n, lambda n: square * n * n)
    assert found == slope // square + 1


def test_no_crossover():
    assert crossover(lambda n: n, lambda n: n) is None
    assert crossover(lambda n: 0, lambda n: n) == 1


@pytest.mark.parametrize(("variant", "is_causal"), WAYS)
def test_crossover_in_macs_is_exact(variant: CountedVariant, is_causal: bool):
    standard = CountedVariant(Choice("standard"), TINY)
    n = crossover(
        partial(variant.macs, is_causal=is_causal),
        partial(standard.macs, is_causal=is_causal),
        limit=2**13,
    )
    if n is not None:
        assert variant.macs(n, is_causal) < standard.macs(n, is_causal)
        assert n == 1 or variant.macs(n - 1, is_causal) >= standard.macs(n - 1, is_causal)
    else:
        assert variant.macs(2**13, is_causal) >= standard.macs(2**13, is_causal)


# ---- paths ---------------------------------------------------------------------------------------


def by_queue(adjacent: torch.Tensor, is_causal: bool) -> int | None:
    """The longest of all shortest paths from j to i, by the textbook's queue, one source at a
    time."""
    n, longest_found = len(adjacent), 0
    followers = [[i for i in range(n) if adjacent[i, j]] for j in range(n)]
    for source in range(n):
        distance = {source: 0}
        queue = deque([source])
        while queue:
            token = queue.popleft()
            for i in followers[token]:
                if i not in distance:
                    distance[i] = distance[token] + 1
                    queue.append(i)
        wanted = range(source, n) if is_causal else range(n)
        if any(i not in distance for i in wanted):
            return None
        longest_found = max(longest_found, *(distance[i] for i in wanted))
    return longest_found


@settings(max_examples=60)
@given(st.integers(1, 24), st.floats(0.02, 0.5), st.booleans(), st.integers(0, 2**31))
def test_search_by_matrices_equals_search_by_queue(
    n: int, density: float, is_causal: bool, seed: int
):
    adjacent = torch.rand(n, n, generator=torch.Generator().manual_seed(seed)) < density
    if is_causal:
        adjacent = adjacent.tril() | torch.eye(n, dtype=torch.bool).roll(1, 0).tril()
    assert longest_path(adjacent, is_causal) == by_queue(adjacent, is_causal)


@pytest.mark.parametrize(("variant", "is_causal"), WAYS)
@pytest.mark.parametrize("n", [1, 2, 63, 65, 200])
def test_known_path_is_what_the_search_finds(variant: CountedVariant, is_causal: bool, n: int):
    attention = variant.attention(n)
    searched = longest_path(support(attention, n, is_causal), is_causal)
    known = known_path(attention, n, is_causal)
    assert known == searched or known is None


def test_paths_that_are_known_by_heart():
    window = CountedVariant(Choice("sliding_window", {"window": 4}), TINY).attention(1)
    assert known_path(window, 16384, False) == known_path(window, 16384, True) == 5461
    assert known_path(CountedVariant(Choice("bigbird"), TINY).attention(1), 16384, False) == 2
    assert known_path(CountedVariant(Choice("linear"), TINY).attention(1), 16384, True) == 1


# ---- presets -------------------------------------------------------------------------------------


def test_model_written_out():
    model = find_model("d=4096,heads=32,kv_heads=8,layers=32", MODELS)
    assert (model.d, model.heads, model.kv_heads, model.layers, model.head_dim, model.ffn) == (
        4096,
        32,
        8,
        32,
        128,
        16384,
    )
    assert find_model("13B", MODELS) is MODELS["13b"]
    assert find_gpu(" memory_gb=48, tflops=150 ,bandwidth_gb=700", GPUS).memory_bytes == 48e9


def test_a_user_adds_presets_without_code(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("mine: {d: 256, heads: 4, layers: 2}\n", encoding="utf-8")
    models = model_presets(tmp_path / "mine.yaml")
    assert (
        models["mine"] == TransformerModel("mine", 256, 4, 2) and models["gpt2"] == MODELS["gpt2"]
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gtp2", r"unknown model 'gtp2' \(did you mean 'gpt2'\?\)"),
        ("d=100,heads=12,layers=1", "d=100 is not divisible by heads=12"),
        ("d=0,heads=12,layers=1", "d=0 must be a whole number of at least 1"),
        ("d=96,heads=12,layers=1,kv_heads=5", "kv_heads=5 must divide heads=12"),
        ("d=96,heads=12", "lacks layers"),
        ("d=96,heads=12,layers=x", "layers='x' must be a whole number"),
        ("d=96,heads=12,layer=1", r"unknown size 'layer' \(did you mean 'layers'\?\)"),
        ("d=96,heads,layers=1", "'heads' is not key=value"),
        ("d=96,d=96,heads=12,layers=1", "gives d twice"),
        ("d=96,heads=12,layers=1,ffn=-4", "ffn=-4 must not be negative"),
    ],
)
def test_refuses_a_model(text: str, said: str):
    with pytest.raises(ValueError, match=said):
        find_model(text, MODELS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("h-100", r"unknown gpu 'h-100' \(did you mean 'h100'\?\)"),
        ("memory_gb=-24,tflops=71,bandwidth_gb=936", "memory_gb=-24 must be above 0"),
        ("memory_gb=nan,tflops=71,bandwidth_gb=936", "memory_gb=nan must be above 0"),
        ("memory_gb=24,tflops=0,bandwidth_gb=936", "tflops=0 must be above 0"),
    ],
)
def test_refuses_a_gpu(text: str, said: str):
    with pytest.raises(ValueError, match=said):
        find_gpu(text, GPUS)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: {d: 1", "is not valid YAML at line"),
        ("", "must map names to sizes"),
        ("- 1\n", "must map names to sizes"),
        ("a: 3\n", "'a' in .* must be a mapping of sizes"),
        ("a: {d: 4, heads: 2, layers: true}\n", "layers=True must be a whole number"),
        ("a: {d: 4.5, heads: 2, layers: 1}\n", "d=4.5 must be a whole number"),
        ("a: {d: 4, heads: 2, layers: 1, gated: maybe}\n", "gated='maybe' must be true or false"),
    ],
)
def test_refuses_a_preset_file(tmp_path: Path, content: str, said: str):
    (tmp_path / "bad.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=said) as error:
        model_presets(tmp_path / "bad.yaml")
    assert "\n" not in str(error.value)


def test_refuses_a_preset_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read: No such file"):
        gpu_presets(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "bad",
    [
        {"length": 0},
        {"length": -5},
        {"share": 0.0},
        {"share": 1.5},
        {"tflops": -1.0},
        {"tflops": float("nan")},
    ],
)
def test_refuses_settings(bad: dict[str, Any]):
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name}=.* must be"):
        Settings(TINY, GPUS["h200"], **bad)


def test_refuses_options_that_come_from_the_model():
    with pytest.raises(ValueError, match="leave out heads, which the model"):
        CountedVariant(Choice("linear", {"heads": 2}), TINY)


# ---- the whole -----------------------------------------------------------------------------------


@thorough
def test_every_variant_of_the_zoo_is_there(found: Scaling):
    for name in ("variant_costs", "variant_limits", "paths"):
        assert set(names()) <= set(found.table(name).values("variant"))
    assert set(found.table("crossovers").values("variant")) == set(names()) - {"standard"}


@thorough
def test_json_and_csv_hold_the_exact_values(found: Scaling):
    content = json.loads(found.to_json())
    assert set(content["tables"]) == {table.name for table in found.tables}
    for table in found.tables:
        assert (
            len(content["tables"][table.name]["rows"])
            == len(list(csv.DictReader(table.to_csv().splitlines())))
            == len(table.rows)
        )
        assert all(set(row) >= {column.key for column in table.columns} for row in table.rows)
    assert "two FLOPs" in content["convention"]


@thorough
def test_figures_have_labelled_axes(found: Scaling):
    drawn = drawings(found)
    assert [drawing.name for drawing in drawn] == [
        "pairs",
        "contours",
        "flops",
        "memory",
        "rnn",
        "time",
        "shares",
        "variants",
    ]
    for drawing in drawn:
        for part in drawing.parts:
            axes = part().axes[0]
            assert axes.get_xlabel()
            assert axes.get_ylabel() or drawing.name == "memory"  # whose rows are named models


@pytest.mark.usefixtures("quick_figures")
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [
        "scaling",
        "--variants",
        "standard",
        "sliding_window:window=64",
        "--model",
        "d=64,heads=2,layers=2",
        "--causal",
        "--length",
        "1000",
    ]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "7,637" in said and "sliding_window window=64" in said and "\x1b" not in said
    assert {path.suffix for path in tmp_path.iterdir()} == {
        ".html",
        ".json",
        ".csv",
        ".png",
        ".svg",
    }
    page = (tmp_path / "scaling.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!#|data:|https://mbrenndoerfer)|url\((?!#)', page)
    assert page.count("<svg") == 11 and "47.1" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--length", "0"], "length=0 must be a whole number of at least 1"),
        (["--model", "gtp2"], "did you mean 'gpt2'"),
        (["--model", "d=100,heads=12,layers=2"], "d=100 is not divisible by heads=12"),
        (["--gpu", "memory_gb=-1,tflops=1,bandwidth_gb=1"], "memory_gb=-1 must be above 0"),
        (["--variants", "perfomer"], "did you mean 'performer'"),
        (["--gpu-presets", "none.yaml"], "cannot be read"),
        (["--share", "2"], "share=2 must be above 0 and at most 1"),
    ],
)
def test_command_refuses_in_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["scaling", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_latent_table_costs_what_the_layers_say() -> None:
    """At Llama 3 8B's width with DeepSeek's 576 numbers a token."""
    model, gpu = model_presets()["llama-3-8b"], gpu_presets()["h100"]
    exact, latent = latent_costs(Settings(model, gpu, 4096, True)).rows
    layers = model.layers
    assert latent["state_token"] == layers * (512 + 64) * 2
    assert exact["state_token"] == layers * 2 * model.key_width * 2
    assert latent["state_bytes"] == 4096 * latent["state_token"]
    with torch.device("meta"):
        layer = attnzoo.LatentAttention(4096, 32, qk_nope_head_dim=128, bias=False)
    core = layer.attention
    beside = layer.cost(1, 1).macs - core.cost(1, 1).macs
    assert latent["macs"] == layers * (
        core.cost(1, 4096, is_causal=True).kernel_macs + 4096 * beside
    )
    step = core.cost(1, 1, 4096, is_causal=True, dtype=torch.bfloat16)
    assert latent["step_macs"] == layers * (step.kernel_macs + beside)
    assert latent["step_bytes"] == layers * (step.moved_bytes + 2 * beside)
    # Every weight is read once in a step: those beside the core, and those that it absorbs.
    absorbed = 32 * 512 * (128 + 128)
    weights = sum(x.numel() for x in layer.parameters() if x.dim() == 2)
    assert beside + absorbed == weights
    assert latent["from_state"] == 1 and 1 < latent["from_step"] <= 2**20
    n = latent["from_step"]
    for m, faster in ((n, True), (n - 1, False)):
        rows = latent_costs(Settings(model, gpu, m, True)).rows
        assert (rows[1]["step_seconds"] < rows[0]["step_seconds"]) is faster
