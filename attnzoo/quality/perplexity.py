"""Perplexity of a causal model with swapped attention, at several lengths from one reading."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attnzoo.quality.mixes import Mix
from attnzoo.quality.subject import Excerpt, Scores, Subject
from attnzoo.registry import spec_of

ROWS = 512  # positions whose logits exist at once: a vocabulary of 49,152 takes 100 MB for them


class CausalSubject(Subject):
    """A decoder that predicts the next token. A text is read from its first word, in sequences one
    after the other."""

    is_causal = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._tokens: dict[tuple[str, str, int], Tensor] = {}
        self._check_head()

    @classmethod
    def sources_of(cls, texts: Iterable[str]) -> list[str]:
        return list(texts)

    def check(self, excerpt: Excerpt, length: int) -> None:
        self.tokens(excerpt, length)

    def tokens(self, excerpt: Excerpt, length: int) -> Tensor:
        """(sequences, length) token ids. Raises ValueError when the text is too short or the length
        beyond the model."""
        if not 2 <= length <= self.longest:
            raise ValueError(
                f"length={length} is not one at which {self.name} can predict a token; give 2 to "
                f"{self.longest}"
            )
        wanted, key = (
            excerpt.sequences * length,
            (excerpt.text, excerpt.part, excerpt.sequences * length),
        )
        if key not in self._tokens:
            ids = self.tokenizer(
                self.texts[excerpt.text][excerpt.part],
                truncation=True,
                max_length=wanted,
                return_tensors="pt",
            ).input_ids
            if ids.shape[1] < wanted:
                raise ValueError(
                    f"the text {excerpt.text!r} has {ids.shape[1]:,} tokens in its part to be "
                    f"{_DOING[excerpt.part]}, and "
                    f"{excerpt.sequences} × {length:,} are asked for; give a longer text, fewer "
                    "sequences or a smaller length"
                )
            self._tokens[key] = ids
        return self._tokens[key].view(excerpt.sequences, length)

    @torch.no_grad()
    def measure(self, mix: Mix, excerpt: Excerpt, lengths: Sequence[int]) -> dict[int, Scores]:
        """Scores by length.

        A mix that decodes token by token has rows that do not depend on what follows them, so that
        the longest reading holds the shorter ones; any other mix reads anew at every length. The
        shorter sequences are the beginnings of the longest ones.
        """
        found: dict[int, Scores] = {}
        one_reading = all(spec_of(choice.name).decodes for choice in mix.values())
        longest = self.tokens(excerpt, max(lengths))
        for group in [sorted(lengths)] if one_reading else [[length] for length in lengths]:
            losses = self._losses(mix, excerpt, longest[:, : group[-1]])
            for length in group:
                macs = self.macs_of_mix(mix, length)
                mean = losses[:, : length - 1].mean().item()
                predictions = excerpt.sequences * (length - 1)
                found[length] = Scores(
                    macs, self.model_macs(macs, length), predictions, math.exp(min(mean, 700.0))
                )
        return found

    def _losses(self, mix: Mix, excerpt: Excerpt, ids: Tensor) -> Tensor:
        """Negative log likelihoods, (sequences, length - 1), in float64: of each token but the
        first of each sequence."""
        head, losses = self.model.get_output_embeddings(), []
        batches = [
            {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids
        ]
        for row, hidden in zip(ids, self.hidden(mix, excerpt, ids.shape[1], batches), strict=True):
            targets = row[1:].to(hidden.device)
            for start in range(0, len(targets), ROWS):
                logits = head(hidden[0, start : min(start + ROWS, len(targets))])
                losses.append(
                    cross_entropy(
                        _at_least_float32(logits), targets[start : start + ROWS], reduction="none"
                    )
                )
        return torch.cat(losses).double().view(len(ids), -1).cpu()

    @torch.no_grad()
    def _check_head(self) -> None:
        """The output layer alone must give the model's logits: some models scale or cap them on the
        way."""
        ids = torch.arange(1, 5, device=self.model.device)[None]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if not torch.allclose(
            self.model(**batch).logits.float(),
            self.model.get_output_embeddings()(self._read(batch)).float(),
            atol=1e-3,
            rtol=1e-3,
        ):
            raise ValueError(
                f"{type(self.model).__name__} does more to its logits than its output layer; its "
                "perplexity cannot be measured here"
            )


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype.itemsize < 4 else logits


_DOING = {"final": "reported on", "choosing": "chosen by", "checking": "checked against"}
