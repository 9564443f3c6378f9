"""attnzoo flops: components that add up to the closed forms, what a swap saves, and one sentence
for each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cases import Case, can
from small import cannot, in_models, of_each_folder
from stages import staged
from torch import nn

import attnzoo
from attnzoo.commands import program
from attnzoo.cost.huggingface_flops import whole_model
from attnzoo.cost.model_flops import (
    CORE,
    FEED_FORWARD,
    HEAD,
    OTHER,
    PROJECTIONS,
    breakdown,
    one_attention,
    one_layer,
)
from attnzoo.cost.model_sizes import TransformerModel
from attnzoo.registry import Choice, sized

pytest.importorskip("fvcore")
pytest.importorskip("transformers")
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
}
# Sizes, causal, projections, feed-forward, head: MACs a token.
FAMILIES: dict[str, tuple[dict[str, Any], bool, int, int, int]] = {
    "bert": (SMALL, False, 4 * 64**2, 2 * 64 * 128, 64 * 64 + 64 * 100),
    "llama": (
        {**SMALL, "num_key_value_heads": 2},
        True,
        2 * 64**2 + 2 * 64 * 32,
        3 * 64 * 128,
        64 * 100,
    ),
    "gpt2": (
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100},
        True,
        4 * 64**2,
        8 * 64**2,
        64 * 100,
    ),
}


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        staged(family, variant, first=variant is None or variant in few)
        for number, family in enumerate(FAMILIES)
        for few in (of_each_folder() if number == 0 else ["cosformer"],)
        for place, variant in enumerate([None, *in_models()])
        # The decoders, which are all but the first, in turn
        if number == 0 or variant is None or place % 2 == number % 2
    ],
)
def test_a_model_by_component(family: str, variant: str | None):
    """The core is the closed form, layer by layer; everything else is what it was."""
    sizes, is_causal, projections, feed_forward, head = FAMILIES[family]
    n, layers = 70, 2
    if variant is not None and not can(Case(variant).spec, is_causal):
        with pytest.raises(attnzoo.UnsupportedError, match=cannot(variant, is_causal)):
            breakdown(whole_model(family, sizes), n, Choice(variant, {}))
        return
    found = breakdown(
        whole_model(family, sizes), n, None if variant is None else Choice(variant, {})
    )
    core = elementwise = gates = 0
    if variant is not None:  # what makes inputs of hidden states
        module = whole_model(family, sizes).call(n, Choice(variant, {})).module
        gates = sum(
            project.weight.numel()
            for name, project in module.named_modules()
            if ".input_projections." in name and isinstance(project, nn.Linear)
        )
    for layer in range(layers):
        options: dict[str, Any] = {"seed": layer} if variant == "bigbird" else {}
        options |= sized(variant or "standard", n)
        attention = attnzoo.build(variant or "standard", heads=4, head_dim=16, **options)
        shared = family == "llama" and not gates  # with gates, each head has keys of its own
        cost = attention.cost(1, n, kv_heads=2 if shared else 4, is_causal=is_causal)
        core, elementwise = core + cost.macs, elementwise + cost.elementwise
    expected = {
        CORE: core,
        PROJECTIONS: n * (layers * projections + gates),
        FEED_FORWARD: layers * n * feed_forward,
        HEAD: n * head,
        OTHER: 0,
    }
    assert found.macs == expected
    assert found.report.macs == sum(expected.values())
    assert found.report.elementwise == sum(found.elementwise.values())
    of_gates = sum(
        count
        for name, count in found.report.elementwise_by_module.items()
        if name.endswith(".input_projections")
    )
    assert found.elementwise[CORE] == elementwise + of_gates


@pytest.mark.parametrize("gated", [False, True])
def test_a_layer_by_component(gated: bool):
    model = TransformerModel("toy", d=48, heads=4, layers=3, kv_heads=2, ffn=100, gated=gated)
    n = 50
    found = breakdown(one_layer(model, True), n, None)
    assert found.macs[PROJECTIONS] == n * model.projection_parameters
    assert found.macs[FEED_FORWARD] == n * model.ffn_parameters
    assert found.macs[CORE] == 2 * n * n * 48
    swapped = breakdown(one_layer(model, True), n, Choice("performer", {"num_features": 32}))
    assert (
        swapped.macs[CORE]
        == attnzoo.build("performer", heads=4, head_dim=12, num_features=32)
        .cost(1, n, kv_heads=2, is_causal=True)
        .macs
    )


def test_one_attention_at_many_tokens():
    n = 2**17
    found = breakdown(one_attention(8, 64, 2, False), n, Choice("linformer", {}))
    assert (
        found.report.macs
        == found.macs[CORE]
        == attnzoo.build("linformer", heads=8, head_dim=64, max_length=n)
        .cost(1, n, kv_heads=2)
        .macs
    )


def test_the_command_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "160")
    arguments = [
        "flops",
        "layer:gpt2",
        "--attention",
        "linear",
        "--lengths",
        "512",
        "2048",
        "--modules",
        "--operators",
        "--output",
        str(tmp_path),
    ]
    assert program.main(arguments) == 0
    out = capsys.readouterr().out
    assert (
        "one layer of GPT-2 Small, bidirectional" in out
        and "feed_forward.up" in out
        and "linear, MACs" in out
    )
    rows = json.loads((tmp_path / "flops.json").read_text())["components"]["rows"]
    exact = {row["component"]: row["exact_macs"] for row in rows if row["n"] == 2048}
    assert exact == {
        CORE: 2 * 2048**2 * 768,
        PROJECTIONS: 4 * 2048 * 768**2,
        FEED_FORWARD: 8 * 2048 * 768**2,
        "together": 2 * 2048**2 * 768 + 12 * 2048 * 768**2,
    }
    assert all(row["exact_flops"] == 2 * row["exact_macs"] for row in rows)
    assert (tmp_path / "flops-components.csv").read_text().startswith("n,component,exact_macs")


def test_a_folder_with_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import transformers

    transformers.AutoConfig.for_model("bert", **SMALL).save_pretrained(tmp_path)
    assert (
        program.main(
            ["flops", str(tmp_path), "--attention", "sliding_window:window=16", "--lengths", "128"]
        )
        == 0
    )
    assert "BertForMaskedLM" in capsys.readouterr().out


MISTAKES = [
    (["standard", "--lengths", "0"], "length=0 must be"),
    (["performer", "--heads", "0"], "heads=0 must be"),
    (["performer", "--attention", "linear"], "performer is an attention itself"),
    (["performer:num_features=x"], "num_features='x' must be int"),
    (["linformer", "--causal"], "linformer cannot be causal"),
    (["layer:d=50,heads=4,layers=1"], "d=50 is not divisible by heads=4"),
    (["layer:gtp2"], "unknown model 'gtp2' (did you mean 'gpt2'"),
    (["sliding_windw"], "unknown model 'sliding_windw' (did you mean 'sliding_window'"),
    (["sliding_window:window"], "'window' is not of the form option=value"),
    (["standard:scale"], "'scale' is not of the form option=value"),
    (["bert:hidden_size"], "'bert:hidden_size' is not of the form MODEL:ENTRY=VALUE"),
    (["bret"], "unknown model 'bret' (did you mean 'bert'"),
    (
        ["bert:hidden_size=100,num_attention_heads=12"],
        "hidden_size=100 is not divisible by num_attention_heads=12",
    ),
    (["bert:hiden_size=100"], "no configuration entry 'hiden_size' (did you mean 'hidden_size'"),
    (["bert", "--lengths", "513"], "length=513 is past the 512 positions"),
    (["bert", "--causal"], "--causal goes with one attention or one layer"),
    (["t5"], "does not read one sequence of tokens"),
    (
        ["llama:num_hidden_layers=1", "--attention", "linformer", "--lengths", "64"],
        "linformer cannot be causal",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    MISTAKES,
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
):
    assert program.main(["flops", *arguments]) == program.REFUSED
    told = capsys.readouterr().err
    assert sentence in told and "Traceback" not in told


def test_a_folder_without_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert program.main(["flops", str(tmp_path)]) == program.REFUSED
    assert "has no config.json" in capsys.readouterr().err
