"""`save` and `load`: what a swap added to a model, in a safetensors file beside the model's own
weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from attnzoo.arguments import check_path
from attnzoo.integrations.record import Record
from attnzoo.integrations.swapping import record_of, swap, unswap
from attnzoo.registry import Choice
from attnzoo.version import __version__

Model = TypeVar("Model", bound=nn.Module)
#: The key of the recipe in the file's metadata, and the version of its form.
METADATA, FORMAT = "attnzoo", 1


def save(model: nn.Module, path: str | Path) -> None:
    """Write a swapped model's recipe (names, options, layers, versions) and what its attentions
    learned or drew.

    model: one that `swap` changed.
    path: of the safetensors file.
    Raises ValueError when the model is not swapped, or when an option is not plain data (a callable
    feature map, a shared module); OSError when the file cannot be written.

    The model's own weights are not in the file: save those beside it, with transformers'
    `save_pretrained` or by `state_dict`. The config that `save_pretrained` writes tells of the
    swap, and `from_pretrained`, which gives exact attention, then warns: `load` this file.
    """
    _safetensors()
    record = record_of(model)
    try:
        recipe = json.dumps(_recipe(record))
    except TypeError as error:
        raise ValueError(
            f"an option of this swap is not plain data ({error}), so a file cannot hold it; give "
            "options as numbers and names"
        ) from None
    write_tensors(_extras(record), path, metadata={METADATA: recipe})


def load(
    model: Model, path: str | Path, *, example_inputs: Mapping[str, Any] | None = None
) -> Model:
    """Swap a model as a file of `save` says, and give its attentions what they had learned. Returns
    the model.

    model: one that is not swapped, of the architecture that the file was saved from. The file is
    read as data only.
    example_inputs: as in `swap`.
    Raises ValueError on a file that cannot be read or does not fit the model, naming the place; the
    model is then as it was.
    """
    recipe, extras = _read(path)
    choices = _choices(recipe, path)
    try:
        swap(model, choices, example_inputs=example_inputs)
    except ValueError as error:
        raise type(error)(f"{path} does not fit this {type(model).__name__}: {error}") from None
    except (TypeError, AttributeError, OverflowError, RuntimeError, MemoryError) as error:
        # Options of kinds and sizes that no attention has.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} has options that no attention can be built with ({reason}); write it again "
            "with attnzoo.save"
        ) from None
    try:
        _fit(record_of(model), recipe, extras, path)
    except BaseException:
        unswap(model)
        raise
    return model


def _recipe(record: Record) -> dict[str, Any]:
    layers = {
        record.keys[layer]: {"name": choice.name, "options": choice.options}
        for layer, choice in record.choices.items()
    }
    versions = {"attnzoo": __version__, "torch": torch.__version__}
    return {
        "format": FORMAT,
        "versions": versions,
        "integration": record.integration,
        "sites": record.sites,
        "layers": layers,
    }


def _extras(record: Record) -> dict[str, Tensor]:
    """The attentions' state, by layer and name."""
    return {
        f"{layer}.{key}": value
        for layer, attention in record.attentions.items()
        for key, value in attention.state_dict().items()
    }


def write_tensors(
    tensors: dict[str, Tensor], path: str | Path, *, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file; copied, since they may share memory and the format does
    not. Raises OSError where it cannot be written."""
    save_file, path = _safetensors().save_file, check_path(path)
    from safetensors import SafetensorError

    copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    try:
        save_file(copies, str(path), metadata=metadata)
    except SafetensorError as error:
        reason = (
            "it is a folder"
            if path.is_dir()
            else "there is no such folder"
            if not path.parent.is_dir()
            else error
        )
        raise OSError(
            f"{path} cannot be written: {reason}; give the path of a file, such as swap.safetensors"
        ) from None


def read_tensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors, on the CPU, of a safetensors file. Raises ValueError when it is
    not a whole one."""
    _safetensors()
    from safetensors import SafetensorError, safe_open

    path = check_path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the path of the file in it")
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # the file is not iterable
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); write it again"
        ) from None


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    metadata, tensors = read_tensors(path)
    if METADATA not in metadata:
        raise ValueError(
            f"{path} was not written by attnzoo.save: its metadata has no {METADATA!r}"
        )
    try:
        recipe = json.loads(metadata[METADATA])
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(
            f"{path} has a recipe that is not JSON; write it again with attnzoo.save"
        ) from None
    if not isinstance(recipe, dict) or recipe.get("format") != FORMAT:
        found = recipe.get("format") if isinstance(recipe, dict) else recipe
        raise ValueError(
            f"{path} has a recipe of format {found!r}; this attnzoo reads format {FORMAT}"
        )
    return recipe, tensors


def _choices(recipe: dict[str, Any], path: str | Path) -> dict[str, Choice]:
    layers = recipe.get("layers")
    if not isinstance(layers, dict) or not layers:
        raise ValueError(f"{path} has a recipe without layers; write it again with attnzoo.save")
    for layer, choice in layers.items():
        if (
            not isinstance(choice, dict)
            or not isinstance(choice.get("name"), str)
            or not isinstance(choice.get("options"), dict)
        ):
            raise ValueError(
                f"{path}, layer {layer}: {choice!r} is not a name and its options; write it again "
                "with attnzoo.save"
            )
    # The saved seeds are those of each layer; swap adds the layer's place to what it is given.
    sites = recipe.get("sites")
    places = (
        {site[0]: place for place, site in enumerate(sites) if isinstance(site, list) and site}
        if isinstance(sites, list)
        else {}
    )
    places.update({str(place): place for place in range(len(places))})
    return {
        layer: Choice(choice["name"], _first_seed(choice["options"], places.get(layer)))
        for layer, choice in layers.items()
    }


def _first_seed(options: dict[str, Any], place: int | None) -> dict[str, Any]:
    seed = options.get("seed")
    return (
        {**options, "seed": seed - place}
        if isinstance(seed, int) and place is not None
        else options
    )


def _fit(
    record: Record, recipe: dict[str, Any], extras: dict[str, Tensor], path: str | Path
) -> None:
    if recipe.get("integration") != record.integration:
        raise ValueError(
            f"{path} is for a model of kind {recipe.get('integration')!r}; this one is "
            f"{record.integration!r}"
        )
    sites = recipe.get("sites")
    if not isinstance(sites, list):
        raise ValueError(f"{path} has a recipe without sites; write it again with attnzoo.save")
    saved = [tuple(site) if isinstance(site, list) else site for site in sites]
    if len(saved) != len(record.sites):
        raise ValueError(
            f"{path} is for a model of {len(saved)} attention layers; this one has "
            f"{len(record.sites)}"
        )
    for layer, (site, wanted) in enumerate(zip(saved, record.sites, strict=True)):
        if site != wanted:
            raise ValueError(
                f"{path}, layer {layer}: the file has (path, heads, head_dim) = {site}, this model "
                f"{wanted}"
            )
    wanted = _extras(record)
    for key in sorted(wanted.keys() | extras.keys()):
        layer, _, name = key.partition(".")
        if key not in extras or key not in wanted:
            raise ValueError(
                f"{path}, layer {layer}: {name!r} is "
                f"{'missing from the file' if key in wanted else 'not part of this attention'}"
            )
        if extras[key].shape != wanted[key].shape:
            raise ValueError(
                f"{path}, layer {layer}: {name!r} has shape {tuple(extras[key].shape)}; it must be "
                f"{tuple(wanted[key].shape)}"
            )
        if _kind(extras[key]) != _kind(wanted[key]):
            raise ValueError(
                f"{path}, layer {layer}: {name!r} has dtype {extras[key].dtype}; this attention "
                f"keeps {wanted[key].dtype} there"
            )
    for layer, attention in record.attentions.items():
        prefix = f"{layer}."
        attention.load_state_dict(
            {
                key.removeprefix(prefix): value
                for key, value in extras.items()
                if key.startswith(prefix)
            }
        )


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError(
            "saving and loading a swap needs safetensors; install it with: pip install "
            "'attnzoo[models]'"
        ) from None
    return safetensors.torch
