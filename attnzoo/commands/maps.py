"""attnzoo maps: A of a model's layers over a text, as a page with the tokens on its axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from attnzoo.commands.command import Command, screen
from attnzoo.results.output import check_folder, write_text

MOST_TOKENS = 512  # whose squares a page can hold


def add_arguments(parser: ArgumentParser) -> None:
    """Which model reads what, which layers are drawn, and where the page goes."""
    parser.add_argument(
        "model",
        type=str,
        help="SmolLM2-135M or MiniLM-L6, from their packages, or a folder of a transformers model "
        "with its tokenizer",
    )
    parser.add_argument("text", type=str, help="the text, or a .txt file that holds it")
    parser.add_argument(
        "--layer",
        type=str,
        default="0",
        metavar="LAYERS",
        help="layers from 0, such as 3, 0-3 or 0-3,6; or all",
    )
    parser.add_argument(
        "--attention",
        type=str,
        metavar="NAME[:OPTION=VALUE,...]",
        help="an attention to swap in first",
    )
    parser.add_argument(
        "--output", type=str, default="report/maps.html", metavar="FILE", help="gets the page"
    )


def run(settings: Namespace) -> int:
    """Read, swap where asked, draw and write."""
    from attnzoo.integrations.maps.attention_maps import attention_maps
    from attnzoo.integrations.swapping import swap
    from attnzoo.public.variant_text import parse_variant
    from attnzoo.report.maps.map_page import LayerMap, map_page

    target = Path(settings.output)
    if target.is_dir():
        raise ValueError(f"output={settings.output!r} is a folder; give a file, such as maps.html")
    check_folder(target.parent)
    choice = None if settings.attention is None else parse_variant(settings.attention)
    text = read_text(settings.text)
    model, tokenizer = load_model(settings.model)
    given = tokenizer(text, return_tensors="pt", verbose=False)
    ids = given["input_ids"]
    check_length(ids.shape[1], model, tokenizer)
    if choice is not None:
        swap(model, choice.name, **choice.options)
    import torch

    chosen = None if settings.layer == "all" else settings.layer
    with attention_maps(model, chosen) as maps, torch.no_grad():
        try:
            model(**given)
        except (IndexError, RuntimeError) as error:  # such as positions that it does not have
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{settings.model} cannot read the text of {ids.shape[1]} tokens: {reason}; give "
                "another text, or try the model itself"
            ) from None
    kind = "exact" if choice is None else choice.label
    layers = [LayerMap(f"{layer}: {maps.paths[layer]}", maps[layer][0]) for layer in maps]
    tokens = [_spelled(tokenizer, int(token)) for token in ids[0]]
    title = f"Attention of {Path(settings.model).name}, {kind}"
    write_text(target, map_page(title, tokens, layers))
    drawn = "1 layer" if len(layers) == 1 else f"{len(layers)} layers"
    read = "1 token" if len(tokens) == 1 else f"{len(tokens)} tokens"
    screen().print(f"{drawn} over {read}: {target}", soft_wrap=True)
    return 0


def check_length(count: int, model: Any, tokenizer: Any) -> None:
    """Raise ValueError where the text has more tokens than a page holds or the model takes."""
    if not 1 <= count <= MOST_TOKENS:
        raise ValueError(
            f"the text has {count} tokens; give one of 1 to {MOST_TOKENS}, since a page "
            "holds a square for every two of them"
        )
    longest = getattr(model.config, "max_position_embeddings", None)
    most = min(tokenizer.model_max_length, longest or MOST_TOKENS)
    if count > most:
        raise ValueError(f"the text has {count} tokens; the model takes {most}: give a shorter one")


def read_text(given: str) -> str:
    """The text itself, or what a .txt file holds. Raises ValueError on an empty one."""
    path = Path(given) if given.endswith(".txt") else None
    try:
        text = given if path is None else path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{given} is not UTF-8 text; save it as UTF-8") from None
    if not text.strip():
        raise ValueError("the text is empty; give some words, or a .txt file that has some")
    return text


def load_model(name: str) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer, by the name of a package's or from a folder.
    Raises ValueError where there is none."""
    from attnzoo.fidelity.pretrained import SOURCES, load
    from attnzoo.packages import require

    folder = Path(name)
    if not folder.is_dir():
        if name not in SOURCES and folder.parent != Path():
            raise ValueError(f"{name} is no folder; give one with config.json and a tokenizer")
        found = load(name)
        return found.model, found.tokenizer
    require("attnzoo maps", ("transformers",))
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        decodes = any("CausalLM" in one for one in config.architectures or ())
        kind = AutoModelForCausalLM if decodes else AutoModel
        model = kind.from_pretrained(folder, local_files_only=True)
        return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} cannot be read as a transformers model: {reason}") from None


def _spelled(tokenizer: Any, token: int) -> str:
    """A token as a reader knows it; a space in front of it is shown."""
    return tokenizer.decode([token]).replace("\n", "\u21b5") or f"<{token}>"


MAPS = Command("maps", "Draw A of a model's layers over a text.", add_arguments, run)
