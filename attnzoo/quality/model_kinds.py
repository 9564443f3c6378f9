"""Models by name or folder, and whether they predict tokens or embed sentences."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnzoo.arguments import nearest
from attnzoo.fidelity.pretrained import SOURCES, Pretrained, load
from attnzoo.packages import require
from attnzoo.quality.embeddings import EncoderSubject
from attnzoo.quality.perplexity import CausalSubject
from attnzoo.quality.subject import Subject

#: Names on the command line, and the models of `attnzoo.fidelity` that they mean.
NAMES = {"smollm2": "SmolLM2-135M", "minilm": "MiniLM-L6"}
CAUSAL, ENCODER = "causal", "encoder"
FOLDER_MODULES = ("transformers", "safetensors")  # all that a saved model needs
KINDS: dict[str, type[Subject]] = {CAUSAL: CausalSubject, ENCODER: EncoderSubject}


@dataclass(frozen=True)
class Model:
    """A model that is not loaded yet.

    kind: "causal" or "encoder".
    folder: None for one of `NAMES`.
    """

    name: str
    kind: str
    folder: Path | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """All that has to be installed to load it."""
        return FOLDER_MODULES if self.folder is not None else SOURCES[self.name].modules

    def sources(self, texts: Mapping[str, Any]) -> list[str]:
        """What is measured apart, as the subject names it."""
        return KINDS[self.kind].sources_of(texts)

    def subject(
        self,
        texts: Mapping[str, Mapping[str, str]],
        *,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
    ) -> Subject:
        """Load it. Raises MissingPackageError without its package, ValueError on a folder that
        transformers cannot load."""
        pretrained = (
            load(self.name)
            if self.folder is None
            else _load_folder(self.name, self.kind, self.folder)
        )
        return KINDS[self.kind](pretrained, texts, device=device, dtype=dtype, seed=seed)


def find_model(text: str) -> Model:
    """smollm2, minilm, or a folder with a saved transformers model and its tokenizer.

    Raises ValueError on an unknown name, a folder without config.json, and a model that neither
    predicts the next token nor is an encoder.
    """
    if text in NAMES:
        return Model(NAMES[text], CAUSAL if SOURCES[NAMES[text]].is_causal else ENCODER)
    folder = Path(text)
    if not folder.is_dir():
        raise ValueError(
            f"unknown model {text!r}{nearest(text, NAMES)}; give {', '.join(NAMES)} or the folder "
            "of a saved transformers model"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"the folder {text!r} has no config.json; give the folder of a saved transformers model"
        )
    return Model(folder.resolve().name, _kind_of(text, folder), folder)


def _kind_of(text: str, folder: Path) -> str:
    require(f"the model in {text!r}", FOLDER_MODULES)
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(
            f"the configuration in {text!r} cannot be read: {_first_line(error)}"
        ) from None
    classes: set[str] = set(getattr(config, "architectures", None) or ())
    if not getattr(config, "is_encoder_decoder", False):
        if classes & set(
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        ) and not _reads_both_ways(config):
            return CAUSAL
        if config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            return ENCODER
    said = " or ".join(sorted(classes)) or config.model_type
    raise ValueError(
        f"{text!r} holds {said}, which is neither a causal language model nor an encoder of text; "
        "give one of these"
    )


def _reads_both_ways(config: Any) -> bool:
    """BertLMHeadModel and its like are causal only when they are told to be a decoder."""
    from transformers.models.auto import modeling_auto

    return config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    )


def _load_folder(name: str, kind: str, folder: Path) -> Pretrained:
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    load_model = (
        AutoModelForCausalLM.from_pretrained if kind == CAUSAL else AutoModel.from_pretrained
    )
    try:
        with redirect_stderr(io.StringIO()):
            model = load_model(folder, dtype=torch.float32, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(
            f"the model in {str(folder)!r} cannot be loaded: {_first_line(error)}"
        ) from None
    return Pretrained(name, kind == CAUSAL, model.eval(), tokenizer)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
