"""Every number that the article's tables print, to the printed digit, from the formulas alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attnzoo.cost import article
from attnzoo.cost.contradictions import contradictions
from attnzoo.cost.hardware import GPU, gpu_presets
from attnzoo.cost.model_sizes import TransformerModel, model_presets
from attnzoo.results.table import Table

PRINTED: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "article_tables.json").read_text(encoding="utf-8")
)
SMALL = TransformerModel("GPT-2 Small", **PRINTED["max_length"]["model"])


def lengths(name: str) -> list[int]:
    return [row["n"] for row in PRINTED[name]["rows"]]


def assert_printed(table: Table, printed: list[dict[str, Any]], digits: dict[str, int]) -> None:
    """Every printed number equals the table's, rounded to the digits of its column (0: a whole
    number, exactly as printed)."""
    assert len(table.rows) == len(printed)
    for row, wanted in zip(table.rows, printed, strict=True):
        for key, value in wanted.items():
            if key in digits:
                assert format(row[key], f".{digits[key]}f") == format(value, f".{digits[key]}f"), (
                    table.name,
                    wanted,
                    key,
                )
            else:
                assert row[key] == value, (table.name, wanted, key)


def test_attention_flops():
    printed = PRINTED["attention_flops"]
    table = article.attention_flops(lengths("attention_flops"), printed["d"])
    assert_printed(table, printed["rows"], {})
    for row in table.rows:
        assert row["with_projections"] == row["flops"] + 4 * row["n"] * printed["d"] ** 2


def test_attention_memory():
    printed = PRINTED["attention_memory"]
    models = [
        TransformerModel(model["name"], model["d"], model["heads"], model["layers"])
        for model in printed["models"]
    ]
    table = article.attention_memory(models, printed["lengths"])
    assert len(table.rows) == len(models) * len(printed["lengths"])
    found = {(row["model"], row["n"]): row["gib"] for row in table.rows}
    for entry in printed["printed"]:
        assert format(found[entry["model"], entry["n"]], ".2f") == format(entry["gib"], ".2f"), (
            entry
        )


def test_rnn_crossover():
    table = article.rnn_crossover(lengths("rnn_crossover"), PRINTED["rnn_crossover"]["d"])
    assert_printed(table, PRINTED["rnn_crossover"]["rows"], {})
    assert [row["n"] for row in table.rows if row["attention"] == row["rnn"]] == [
        PRINTED["rnn_crossover"]["d"]
    ]


def test_path_length():
    table = article.path_length(lengths("path_length"), PRINTED["path_length"]["d"])
    assert_printed(table, PRINTED["path_length"]["rows"], {})
    for row in table.rows:
        assert (row["rnn_max"], row["rnn_mean"], row["attention"]) == (
            row["n"] - 1,
            (row["n"] - 1) / 2,
            1,
        )


def test_max_length():
    printed = PRINTED["max_length"]["rows"]
    gpus = [GPU(row["gpu"], row["memory_gb"], tflops=1, bandwidth_gb=1) for row in printed]
    assert_printed(article.max_length(SMALL, gpus), printed, {})


def test_attention_time():
    printed = PRINTED["attention_time"]
    table = article.attention_time(SMALL, lengths("attention_time"), printed["tflops"] * 1e12)
    assert_printed(table, printed["rows"], {"ms": 2, "tokens_per_s": 0})


def test_layer_breakdown():
    printed = PRINTED["layer_breakdown"]
    table = article.layer_breakdown(lengths("layer_breakdown"), printed["d"])
    assert_printed(table, printed["rows"], {"attention": 1, "projections": 1, "ffn": 1})
    for row in table.rows:
        assert row["attention"] + row["projections"] + row["ffn"] == pytest.approx(100, abs=1e-12)
        assert (
            row["total_macs"]
            == 2 * row["n"] ** 2 * printed["d"] + 12 * row["n"] * printed["d"] ** 2
        )


def test_variant_complexity():
    printed = PRINTED["variant_complexity"]
    table = article.variant_complexity(printed["n"], printed["d"])
    assert [variant.split(",")[0] for variant in table.values("variant")] == [
        row["variant"].split(",")[0] for row in printed["rows"]
    ]
    assert_printed(
        table,
        [{"flops": row["flops"], "speedup": row["speedup"]} for row in printed["rows"]],
        {"speedup": 1},
    )


def test_shipped_presets_are_the_articles_models_and_gpus():
    models = {model.title: model for model in model_presets().values()}
    for wanted in PRINTED["attention_memory"]["models"]:
        model = models[wanted["name"]]
        assert (model.d, model.heads, model.layers) == (
            wanted["d"],
            wanted["heads"],
            wanted["layers"],
        )
    gpus = {gpu.title: gpu for gpu in gpu_presets().values()}
    for wanted in PRINTED["max_length"]["rows"]:
        assert gpus[wanted["gpu"]].memory_gb == wanted["memory_gb"]


def test_default_lengths_are_the_articles():
    for name in ("attention_flops", "rnn_crossover", "path_length", "layer_breakdown"):
        assert getattr(article, name)().values("n") == lengths(name)
    assert article.attention_time(SMALL).values("n") == lengths("attention_time")
    assert list(article.MEMORY_LENGTHS) == PRINTED["attention_memory"]["lengths"]


def test_contradictions_name_the_tables_numbers():
    found = " ".join(
        f"{c.prose}: {c.table}"
        for c in contradictions(SMALL, *(GPU("", gb, 1, 1) for gb in (24, 80)))
    )
    for number in (
        "7,637",
        "13,944",
        "254",
        "63.2",
        "18.2",
        "47.1",
        "0.11",
        "1.27",
        "18.56",
        "12.0",
        "128×",
        "21×",
    ):
        assert number in found


@pytest.mark.parametrize("n", [0, -1, 2.5, True])
def test_refuses_lengths_that_are_none(n: Any):
    with pytest.raises(ValueError, match=r"n=.* must be a whole number of at least 1"):
        article.attention_flops([n])
