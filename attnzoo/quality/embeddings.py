"""Sentence embeddings of an encoder with swapped attention, and what they retrieve, beside the
exact ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from attnzoo.quality.mixes import Mix
from attnzoo.quality.subject import Excerpt, Scores, Subject
from attnzoo.texts.text_parts import passages

BATCH = 16  # passages in one forward
QUERY_EVERY = 6  # passage of a text is a query, and not in the set that is searched
NEAREST = 10
WORDS_PER_TOKEN = 0.8  # a passage of so many words fills its tokens, in most English texts


class EncoderSubject(Subject):
    """An encoder whose embedding is the mean of its last hidden states over the real tokens, at
    unit length.

    Passages are consecutive paragraphs of all texts, of about `length` tokens and cut to them;
    `Excerpt.sequences` is how many of each text.
    """

    is_causal = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._batches: dict[Any, list[dict[str, Tensor]]] = {}
        self._exact: dict[Any, Tensor] = {}

    @classmethod
    def sources_of(cls, texts: Iterable[str]) -> list[str]:
        return ["+".join(texts)]

    def check(self, excerpt: Excerpt, length: int) -> None:
        if not 3 <= length <= self.longest:
            raise ValueError(
                f"length={length} is not one that {self.name} can read; give 3 to {self.longest}"
            )
        found = len(self._passages(excerpt, length))
        if found < NEAREST * QUERY_EVERY / (QUERY_EVERY - 1):
            raise ValueError(
                f"the text {excerpt.text!r} has {found} passages of {length:,} tokens in a part, "
                f"and the {NEAREST} nearest of them are compared; "
                f"give a longer text, a smaller length or more sequences"
            )

    @torch.no_grad()
    def measure(self, mix: Mix, excerpt: Excerpt, lengths: Sequence[int]) -> dict[int, Scores]:
        """Every length is read anew."""
        return {length: self._measure(mix, excerpt, length) for length in lengths}

    def _measure(self, mix: Mix, excerpt: Excerpt, length: int) -> Scores:
        if (excerpt, length) not in self._exact:
            self._exact[excerpt, length] = self._embed({}, excerpt, length)
        exact = self._exact[excerpt, length]
        found = self._embed(mix, excerpt, length) if mix else exact
        nearest, wanted = _nearest(found), _nearest(exact)
        shared = (nearest[:, :, None] == wanted[:, None, :]).any(2).double().mean()
        macs = self.macs_of_mix(mix, length)
        return Scores(
            macs,
            self.model_macs(macs, length),
            len(found),
            cosine=cosine_similarity(found, exact).mean().item(),
            top1=(nearest[:, 0] == wanted[:, 0]).double().mean().item(),
            top10=shared.item(),
        )

    def _embed(self, mix: Mix, excerpt: Excerpt, length: int) -> Tensor:
        """(passages, width) in float64, of unit length."""
        batches, found = self._tokens(excerpt, length), []
        for batch, hidden in zip(batches, self.hidden(mix, excerpt, length, batches), strict=True):
            mask = batch["attention_mask"][:, :, None].to(hidden)
            found.append(normalize(((hidden * mask).sum(1) / mask.sum(1)).double(), dim=-1).cpu())
        return torch.cat(found)

    def _tokens(self, excerpt: Excerpt, length: int) -> list[dict[str, Tensor]]:
        if (excerpt, length) not in self._batches:
            texts = self._passages(excerpt, length)
            options: dict[str, Any] = {
                "truncation": True,
                "max_length": length,
                "padding": True,
                "return_tensors": "pt",
            }
            read = [
                self.tokenizer(texts[start : start + BATCH], **options)
                for start in range(0, len(texts), BATCH)
            ]
            self._batches[excerpt, length] = [
                {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
                for batch in read
            ]
        return self._batches[excerpt, length]

    def _passages(self, excerpt: Excerpt, length: int) -> list[str]:
        names = excerpt.text.split("+")
        return [
            text
            for name in names
            for text in passages(self.texts[name][excerpt.part], round(length * WORDS_PER_TOKEN))[
                : excerpt.sequences
            ]
        ]


def _nearest(embeddings: Tensor) -> Tensor:
    """(queries, NEAREST) indices of the passages nearest to every query, the nearest first."""
    is_query = torch.arange(len(embeddings)) % QUERY_EVERY == 0
    return (embeddings[is_query] @ embeddings[~is_query].T).topk(NEAREST).indices
