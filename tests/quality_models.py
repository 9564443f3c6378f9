"""Tiny random models and texts for tests of quality: a tokenizer of letters, a causal model and an
encoder."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from swap_models import make

from attnzoo.fidelity.pretrained import Pretrained
from attnzoo.quality.embeddings import EncoderSubject
from attnzoo.quality.perplexity import CausalSubject

SENTENCE = (
    "to be or not to be that is the question whether it is nobler in the mind to suffer slings and "
    "arrows"
)
WORDS = SENTENCE.split()


class Letters:
    """A tokenizer: one token a character."""

    def __call__(
        self,
        text: str | list[str],
        max_length: int,
        truncation: bool = True,
        padding: bool = False,
        return_tensors: str = "pt",
    ) -> Any:
        rows = [
            [3 + ord(letter) % 47 for letter in one[:max_length]]
            for one in ([text] if isinstance(text, str) else text)
        ]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return SimpleNamespace(input_ids=ids, attention_mask=mask)


def part(number: int, paragraphs: int = 80) -> str:
    """Another text for every number, in paragraphs of eight words."""
    return "\n\n".join(
        " ".join(
            WORDS[(number * 5 + 3 * line + step * (1 + line % 4)) % len(WORDS)] for step in range(8)
        )
        for line in range(paragraphs)
    )


TEXTS = {
    "hamlet": {"final": part(1), "choosing": part(2), "checking": part(3)},
    "macbeth": {"final": part(4), "choosing": part(5), "checking": part(6)},
}
OPTIONS: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float64, "seed": 0}


def causal(family: str = "llama", **options: Any) -> CausalSubject:
    return CausalSubject(
        Pretrained(
            "tiny",
            True,
            make(family, max_position_embeddings=256, attn_implementation="sdpa", **options),
            Letters(),
        ),
        TEXTS,
        **OPTIONS,
    )


def encoder() -> EncoderSubject:
    return EncoderSubject(
        Pretrained("tiny", False, make("bert", max_position_embeddings=256), Letters()),
        TEXTS,
        **OPTIONS,
    )
