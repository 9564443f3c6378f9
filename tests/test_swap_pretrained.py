"""Swap, train, save_pretrained, from_pretrained: the saved model says that it was swapped, and the
whole recipe gives it back."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from small import in_models, of_each_family, small
from stages import only
from swap_models import answer, make, tokens

import attnzoo

hf: Any = transformers

SAVED = (
    r"this {} was saved with its attention swapped \({} in {} layers\), and "
    r"from_pretrained gives it exact attention: swap it again with attnzoo"
)

FORMS: list[tuple[str, dict[str, Any]]] = [(name, small(name)) for name in in_models()]
FORMS += [
    ("linformer", {**small("linformer"), "sharing": sharing})
    for sharing in ("none", "key_value", "layerwise")
]


def trained(name: str, options: dict[str, Any]) -> Any:
    """A swapped model after a few steps, in evaluation mode."""
    model = attnzoo.swap(
        make("llama" if attnzoo.describe(name).spec.causal else "bert"), name, **options
    ).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        answer(model, tokens()).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    ("name", "options"), only([one for one in FORMS if one[0] in of_each_family()], FORMS)
)
def test_the_whole_recipe(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = trained(name, options)
    wanted = answer(model, tokens())
    model.save_pretrained(tmp_path)
    attnzoo.save(model, tmp_path / "attnzoo.safetensors")

    with pytest.warns(UserWarning, match=SAVED.format(type(model).__name__, name, 3)) as caught:
        loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert {warning.filename for warning in caught if "attnzoo" in str(warning.message)} == {
        __file__
    }
    attnzoo.load(loaded, tmp_path / "attnzoo.safetensors")
    assert torch.equal(answer(loaded, tokens()), wanted)
    exact = answer(attnzoo.unswap(loaded), tokens())
    assert torch.equal(exact, answer(attnzoo.unswap(model), tokens()))
    assert not hasattr(loaded.config, "attnzoo_swaps") and not hasattr(
        model.config, "attnzoo_swaps"
    )


def loads_silently(kind: Any, folder: Path) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = kind.from_pretrained(folder)
    assert not [warning for warning in caught if "attnzoo" in str(warning.message)]
    return model


def test_what_is_not_swapped_any_more_says_nothing(tmp_path: Path) -> None:
    model = attnzoo.swap(make("bert"), "linear")
    attnzoo.unswap(model).save_pretrained(tmp_path / "unswapped")
    loads_silently(hf.BertModel, tmp_path / "unswapped")
    attnzoo.swap(model, "linear").save_pretrained(tmp_path / "swapped")
    with pytest.warns(UserWarning, match="attnzoo"):
        exact = hf.AutoModel.from_pretrained(tmp_path / "swapped")
    del exact.config.attnzoo_swaps  # as the warning says
    exact.save_pretrained(tmp_path / "exact")
    loads_silently(hf.AutoModel, tmp_path / "exact")


def test_parts_tell_of_themselves(tmp_path: Path) -> None:
    """BART's halves share one config, CLIP's do not; each part that was swapped is named."""
    bart = make("bart")
    attnzoo.swap(bart.get_encoder(), "linear")
    attnzoo.swap(bart.get_decoder(), "sliding_window", window=4)
    bart.save_pretrained(tmp_path / "bart")
    with pytest.warns(UserWarning, match="was saved with its attention swapped") as caught:
        hf.BartForConditionalGeneration.from_pretrained(tmp_path / "bart")
    told = [str(warning.message) for warning in caught if "attnzoo" in str(warning.message)]
    assert (
        len(told) == 2
        and "this BartEncoder" in told[0]
        and "(linear in 2" in told[0]
        and "this BartDecoder" in told[1]
    )
    clip = make("clip")
    attnzoo.swap(clip.text_model, "performer", layers=1)
    clip.save_pretrained(tmp_path / "clip")
    saved = json.loads((tmp_path / "clip/config.json").read_text())
    assert "attnzoo_swaps" not in saved and saved["text_config"]["attnzoo_swaps"][0]["layers"] == {
        "1": "performer"
    }
    with pytest.warns(
        UserWarning,
        match=r"this CLIPText\w+ was saved with its attention swapped \(performer in 1 layers\)",
    ):
        hf.CLIPModel.from_pretrained(tmp_path / "clip")


def test_options_that_are_no_plain_data_are_saved_by_name(tmp_path: Path) -> None:
    attnzoo.swap(make("bert"), "linear", feature_map=torch.sigmoid).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=SAVED.format("BertModel", "linear", 3)):
        hf.BertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_is_undone_apart_from_its_model(duplicate: Any) -> None:
    model = make("bert")
    exact = answer(model, tokens())
    swapped = answer(attnzoo.swap(model, "linear"), tokens())
    copied = duplicate(model)
    attnzoo.unswap(copied)
    assert (
        torch.equal(answer(copied, tokens()), exact)
        and copied.config._attn_implementation == "eager"
    )
    assert torch.equal(answer(model, tokens()), swapped) and model.config.attnzoo_swaps
    attnzoo.unswap(model)
    assert (
        torch.equal(answer(model, tokens()), exact) and model.config._attn_implementation == "eager"
    )


@pytest.mark.thorough
@pytest.mark.parametrize("first", ["attnzoo", "transformers"])
def test_the_warning_does_not_depend_on_what_is_imported_first(first: str, tmp_path: Path) -> None:
    attnzoo.swap(make("bert"), "linear").save_pretrained(tmp_path)
    second = {"attnzoo": "transformers", "transformers": "attnzoo"}[first]
    program = f"""
import sys, warnings
import {first}
assert "transformers.modeling_utils" not in sys.modules
import {second}
import attnzoo.integrations
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    transformers.BertModel.from_pretrained({str(tmp_path)!r})
assert len([w for w in caught if "attnzoo" in str(w.message)]) == 1, caught
assert not [f for f in sys.meta_path if "attnzoo" in type(f).__module__]
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
