"""attnzoo.save and attnzoo.load: what was swapped comes back, and nothing that does not fit gets
in."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import safetensors.torch
from swap_models import answer, make, tokens

import attnzoo

MIXES: list[Any] = [
    "standard",
    {
        "0": ("linformer", {"max_length": 32, "rank": 4}),
        "1-2": ("bigbird", {"block_size": 4, "seed": 9}),
    },
    {1: ("performer", {"num_features": 16, "seed": 3})},
    {"0-2": ("linformer", {"max_length": 32, "rank": 4, "sharing": "layerwise"})},
]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "swap.safetensors"
    attnzoo.save(
        attnzoo.swap(make("bert"), "linformer", max_length=32, rank=4, layers=[0, 2]), path
    )
    return path


def rewrite(path: Path, change: Any) -> None:
    """Write the file again with its recipe and tensors passed through change(recipe, tensors)."""
    with safetensors.safe_open(str(path), framework="pt") as file:
        recipe = json.loads(file.metadata()["attnzoo"])
        tensors = {key: file.get_tensor(key) for key in list(file.keys())}
    change(recipe, tensors)
    safetensors.torch.save_file(tensors, str(path), metadata={"attnzoo": json.dumps(recipe)})


def integers(tensors: dict[str, Any]) -> None:
    tensors["0.key_projection.weight"] = tensors["0.key_projection.weight"].long()


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_what_was_saved_comes_back(mix: Any, tmp_path: Path) -> None:
    model, path = attnzoo.swap(make("bert"), mix), tmp_path / "swap.safetensors"
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, attnzoo.Attention):
                for parameter in module.parameters():
                    parameter.add_(0.5)  # learned meanwhile
                redraw: Any = getattr(module, "redraw", lambda seed: None)
                redraw(77)
    attnzoo.save(model, path)
    other = attnzoo.load(make("bert"), path)
    assert torch.equal(answer(other, tokens()), answer(model, tokens()))
    assert list(other.state_dict()) == list(model.state_dict())
    assert other._attnzoo_swap.choices == model._attnzoo_swap.choices
    exact = answer(make("bert"), tokens())
    assert torch.equal(answer(attnzoo.unswap(other), tokens()), exact)


def test_a_model_that_is_not_swapped_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not swapped"):
        attnzoo.save(make("bert"), tmp_path / "x")
    with pytest.raises(ValueError, match="not plain data"):
        attnzoo.save(
            attnzoo.swap(make("bert"), "linear", feature_map=torch.sigmoid), tmp_path / "x"
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", [0, 3, 8, 30, 200])
def test_a_file_with_a_wrong_byte_in_its_header(place: int, saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    data[place] ^= 0xFF
    saved.write_bytes(bytes(data))
    refused(saved, "not a whole safetensors file")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file(keep: int, saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    refused(saved, "not a whole safetensors file")


def test_files_of_another_kind(saved: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    saved.write_bytes(pickle.dumps(Evil()))
    refused(saved, "not a whole safetensors file")
    torch.save({"a": torch.ones(2)}, saved)
    refused(saved, "not a whole safetensors file")
    safetensors.torch.save_file({"a": torch.ones(2)}, str(saved))
    refused(saved, "was not written by attnzoo.save")
    safetensors.torch.save_file({"a": torch.ones(2)}, str(saved), metadata={"attnzoo": "{"})
    refused(saved, "not JSON")
    refused(tmp_path / "missing", "cannot be read")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda recipe, tensors: recipe.update(format=2), "format 2; this attnzoo reads format 1"),
        (lambda recipe, tensors: recipe.update(layers={}), "without layers"),
        (
            lambda recipe, tensors: recipe["layers"].update({"1": "linear"}),
            "layer 1: 'linear' is not a name",
        ),
        (
            lambda recipe, tensors: recipe["layers"].update({"9": recipe["layers"]["0"]}),
            "9.*0 to 2",
        ),
        (
            lambda recipe, tensors: recipe["layers"]["0"].update(name="linfomer"),
            "did you mean 'linformer'",
        ),
        (lambda recipe, tensors: recipe["layers"]["0"]["options"].update(rank="x"), "rank='x'"),
        (
            lambda recipe, tensors: recipe["layers"]["0"]["options"].update(rank=5),
            r"layer 0: 'key_projection.weight' has shape \(1, 32, 4\)",
        ),
        (
            lambda recipe, tensors: recipe["layers"]["0"]["options"].update(projection="x"),
            "options that no attention can be built with",
        ),
        (
            lambda recipe, tensors: recipe["layers"]["0"]["options"].update(max_length=10**15),
            "can be built with .*memory",
        ),
        (
            lambda recipe, tensors: recipe["layers"]["0"]["options"].update(heads=2),
            "swap does not take 'heads'",
        ),
        (
            lambda recipe, tensors: recipe["layers"]["0"]["options"].update(surprise=2),
            "linformer has no option 'surprise'",
        ),
        (
            lambda recipe, tensors: recipe["sites"].pop(),
            "a model of 2 attention layers; this one has 3",
        ),
        (lambda recipe, tensors: recipe.update(sites=3), "write it again"),
        (lambda recipe, tensors: recipe["sites"][1].__setitem__(1, 8), "layer 1: the file has"),
        (lambda recipe, tensors: recipe.update(integration="timm"), "kind 'timm'"),
        (
            lambda recipe, tensors: integers(tensors),
            "layer 0: 'key_projection.weight' has dtype torch.int64; this attention keeps "
            "torch.float32",
        ),
        (
            lambda recipe, tensors: tensors.pop("2.key_projection.weight"),
            "layer 2: 'key_projection.weight' is missing",
        ),
        (
            lambda recipe, tensors: tensors.update({"1.x": torch.ones(1)}),
            "layer 1: 'x' is not part",
        ),
    ],
)
def test_a_file_that_does_not_fit(change: Any, message: str, saved: Path) -> None:
    rewrite(saved, change)
    refused(saved, message)


def test_a_file_of_another_model(saved: Path) -> None:
    refused(saved, "linformer cannot be causal", "llama")
    refused(saved, "a model of 3 attention layers; this one has 4", num_hidden_layers=4)
    refused(saved, r"layer 0: the file has .* 4, 8\), this model .* 2, 16\)", num_attention_heads=2)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    model = attnzoo.swap(make("bert"), "linear")
    with pytest.raises(
        OSError, match=r"nowhere/swap\.safetensors cannot be written: there is no such folder"
    ):
        attnzoo.save(model, tmp_path / "nowhere" / "swap.safetensors")
    with pytest.raises(OSError, match="cannot be written: it is a folder"):
        attnzoo.save(model, tmp_path)
    refused(tmp_path, "is a folder; give the path of the file in it")


def refused(path: Path, message: str, family: str = "bert", **options: Any) -> None:
    model = make(family, **options)
    keys, exact = list(model.state_dict()), answer(model, tokens())
    with pytest.raises(ValueError, match=message) as caught:
        attnzoo.load(model, path)
    assert path.name in str(caught.value)
    assert (
        list(model.state_dict()) == keys
        and torch.equal(answer(model, tokens()), exact)
        and model.config._attn_implementation == "eager"
    )
