"""A pretrained model whose attention is swapped, measured, and put back: what a decoder and an
encoder have in common."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.attention import Attention
from attnzoo.fidelity.measure_variant import BASELINE
from attnzoo.fidelity.pretrained import Pretrained
from attnzoo.integrations.huggingface.probe import find_sites
from attnzoo.integrations.swapping import swap, unswap
from attnzoo.quality.later_layers import blocks_of, recording, resumed
from attnzoo.quality.mixes import Mix, resolved, swap_plan
from attnzoo.registry import Choice
from attnzoo.texts.text_parts import CHOOSING

PRODUCTS = ("Linear", "Conv1D")  # GPT-2's Conv1D is a linear layer
TRIED = 4  # tokens of the read that finds out which products run for every token


@dataclass(frozen=True)
class Scores:
    """What one measurement found; None where the kind of model has no such number."""

    attention_macs: int
    model_macs: int
    predictions: int | None = None
    perplexity: float | None = None
    cosine: float | None = None
    top1: float | None = None
    top10: float | None = None


@dataclass(frozen=True)
class Excerpt:
    """Which tokens are read: of a text (or of several, joined by "+"), the part, and so many
    sequences (an encoder: passages) of it."""

    text: str
    part: str
    sequences: int


class Subject(ABC):
    """A model on a device.

    seed: of what the attentions draw; every mix starts from it.
    """

    is_causal: bool

    def __init__(
        self,
        pretrained: Pretrained,
        texts: Mapping[str, Mapping[str, str]],
        *,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self.name, self.tokenizer, self.texts, self.seed = (
            pretrained.name,
            pretrained.tokenizer,
            texts,
            seed,
        )
        self.longest = pretrained.max_length
        self.model: Any = pretrained.model.to(device=device, dtype=dtype)
        self.sites = find_sites(self.model)
        self.blocks = blocks_of(self.model, [site.path for site in self.sites])
        # An excerpt and length, and the blocks' outputs on each of its batches.
        self.kept: tuple[Any, list[list[Any]]] = (None, [])
        self._macs: dict[Any, int] = {}
        self.other_macs_per_token = self._other_macs_per_token()

    @property
    def layers(self) -> int:
        return len(self.sites)

    @classmethod
    @abstractmethod
    def sources_of(cls, texts: Iterable[str]) -> list[str]:
        """What is measured apart, of these texts: names for `Excerpt.text`."""

    @abstractmethod
    def check(self, excerpt: Excerpt, length: int) -> None:
        """Raise ValueError when the text has not so many tokens, or the model not so many
        positions."""

    @abstractmethod
    def measure(self, mix: Mix, excerpt: Excerpt, lengths: Sequence[int]) -> dict[int, Scores]:
        """Scores of the model with this mix, by length. Raises ValueError where an attention cannot
        do what the model needs."""

    @contextmanager
    def swapped(self, mix: Mix, length: int) -> Iterator[None]:
        """The model with the mix, for inputs of at most `length` tokens, and its own attention
        again afterwards."""
        if not mix:
            yield
            return
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # While training, and nothing is trained here.
            warnings.filterwarnings("ignore", message=".* drops entries of A ")
            torch.manual_seed(self.seed)
            swap(self.model, swap_plan(mix, length, self.seed))
        try:
            yield
        finally:
            unswap(self.model)

    def hidden(
        self, mix: Mix, excerpt: Excerpt, length: int, batches: Sequence[dict[str, Tensor]]
    ) -> Iterator[Tensor]:
        """Last hidden states of each batch, (batch, length, width), from the model with this mix.

        On the text to choose by, where one layer after the other is swapped, the exact layers
        before it are computed once.
        """
        first, key = min(mix, default=0), (excerpt, length)
        if first and excerpt.part == CHOOSING and self.kept[0] != key:
            self.kept = (key, [self._recorded(batch) for batch in batches])
        with self.swapped(mix, length):
            for number, batch in enumerate(batches):
                with resumed(
                    self.blocks, self.kept[1][number] if self.kept[0] == key else [], first
                ):
                    found = self._read(batch)
                yield found

    def _recorded(self, batch: dict[str, Tensor]) -> list[Any]:
        """What every block of the exact model gives."""
        outputs: list[Any] = []
        with recording(self.blocks, outputs):
            self._read(batch)
        return outputs

    def model_macs(self, attention_macs: int, length: int) -> int:
        """Attention, and every linear layer that runs for each token."""
        return attention_macs + self.other_macs_per_token * length

    def macs_of_mix(self, mix: Mix, length: int) -> int:
        """MACs of all attentions on one sequence."""
        return sum(
            self.macs_of_layer(layer, mix.get(layer, BASELINE), length)
            for layer in range(self.layers)
        )

    def macs_of_layer(self, layer: int, choice: Choice, length: int) -> int:
        """MACs of one layer's attention on one sequence."""
        site, key = (
            self.sites[layer],
            (choice.label, self.sites[layer].heads, self.sites[layer].head_dim, length),
        )
        if key not in self._macs:
            with torch.device("meta"):
                attention = resolved(choice, length, self.seed).build(site.heads, site.head_dim)
            self._macs[key] = self._count(attention, length)
        return self._macs[key]

    def _count(self, attention: Attention, length: int) -> int:
        kv_heads = getattr(self.model.config, "num_key_value_heads", None) or attention.heads
        return attention.cost(1, length, kv_heads=kv_heads, is_causal=self.is_causal).kernel_macs

    def _read(self, batch: dict[str, Tensor]) -> Tensor:
        options = {"use_cache": False} if self.is_causal else {}
        return self.model.base_model(
            **{name: tensor.to(self.model.device) for name, tensor in batch.items()}, **options
        ).last_hidden_state

    @torch.no_grad()
    def _other_macs_per_token(self) -> int:
        found: list[int] = []

        def count(module: Any, inputs: Any, output: Any) -> None:
            if tuple(output.shape[:2]) == (1, TRIED):
                found.append(module.weight.numel())

        handles = [
            module.register_forward_hook(count)
            for module in self.model.modules()
            if type(module).__name__ in PRODUCTS
        ]
        ids = torch.ones(1, TRIED, dtype=torch.long, device=self.model.device)
        try:
            self.model(input_ids=ids, attention_mask=torch.ones_like(ids))
        finally:
            for handle in handles:
                handle.remove()
        return sum(found)
