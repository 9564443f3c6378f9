"""What choosing keys by the data brings over choosing them by position: SmolLM2-135M with its
attention swapped in every layer, nothing trained.

    python benchmarks/selected_quality.py [--output FILE] [--lengths 4096 8192] [--keys 512]

All contenders show a query at most `--keys` keys: the nearest ones beside 4 sinks, BigBird's blocks
of 64, and the blocks that MoBA and XAttention select. Of each, perplexity on both texts at the
first length; the share of softmax's top 16 keys and of its mass that it sees, on queries and keys
of the exact model (first, middle and last layer and head, 2,048 tokens of Hamlet); its attention's
share of exact attention's multiply-accumulates; and a needle: five digits in the middle of other
text, asked for at its end, by the probability of the right ones and how many of them are the
likeliest. SmolLM2 reads up to 8,192 tokens by its config.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.benchmarking.environment import environment
from attnzoo.call import repeat_heads
from attnzoo.fidelity.comparison_rows import Sample
from attnzoo.fidelity.pretrained import load
from attnzoo.fidelity.samples import load_samples
from attnzoo.quality.perplexity import CausalSubject
from attnzoo.quality.subject import Excerpt
from attnzoo.registry import Choice
from attnzoo.texts.text_parts import CHECKING, FINAL, PROSE, SHAKESPEARE, read_text

MODEL = "SmolLM2-135M"
TOP, SEEN_LENGTH, FIRST_ROW = 16, 2048, 512  # earlier rows see all in every contender
DIGITS, BLOCK = "71943", 64
NEEDLE = f" The secret number is {DIGITS}. Remember it: the secret number is {DIGITS}. "
QUESTION = " What is the secret number? The secret number is "


def contenders(keys: int) -> list[Choice | None]:
    """None: exact attention."""
    blocks = keys // BLOCK
    return [
        None,
        Choice("sliding_window", {"window": keys - 4, "sinks": 4}),
        Choice(
            "bigbird",
            {
                "block_size": BLOCK,
                "num_window_blocks": 2 * (blocks // 2) - 1,  # of which a causal row sees half
                "num_global_blocks": 1,
                "num_random_blocks": blocks - blocks // 2 - 1,
            },
        ),
        Choice("moba", {"block_size": BLOCK, "top_k": blocks}),
        Choice("moba", {"block_size": BLOCK // 4, "top_k": 4 * blocks}),
        Choice("xattention", {"block_size": BLOCK, "max_blocks": blocks}),
        Choice("xattention", {"block_size": BLOCK // 4, "max_blocks": 4 * blocks}),
    ]


def needle(subject: CausalSubject, length: int) -> tuple[Tensor, int]:
    """(1, length) tokens, the last of which are the digits, and how many these are."""

    def ids(text: str) -> list[int]:
        return subject.tokenizer(text).input_ids

    answer, question, fact = ids(DIGITS), ids(QUESTION), ids(NEEDLE)
    rest = length - len(answer) - len(question) - len(fact)
    filler = ids(subject.texts[PROSE][CHECKING])[:rest]
    assert len(filler) == rest, f"the prose has {len(filler)} tokens"
    half = rest // 2
    whole = filler[:half] + fact + filler[half:] + question + answer
    return torch.tensor([whole]), len(answer)


@torch.no_grad()
def found(subject: CausalSubject, choice: Choice | None, length: int) -> dict[str, float]:
    """How likely the right digits are, together, and how many of them are the likeliest."""
    ids, count = needle(subject, length)
    mix = {} if choice is None else dict.fromkeys(range(subject.layers), choice)
    with subject.swapped(mix, length):
        hidden = subject.model.base_model(ids, use_cache=False).last_hidden_state[
            :, -count - 1 : -1
        ]
    logits = subject.model.get_output_embeddings()(hidden)[0].float()
    right = ids[0, -count:]
    chances = logits.log_softmax(-1).gather(1, right[:, None])
    return {
        "probability": chances.sum().exp().item(),
        "digits": int((logits.argmax(-1) == right).sum()),
        "of": count,
    }


@cache
def samples() -> tuple[Sample, ...]:
    """Queries and keys of the exact model."""
    return load_samples([SEEN_LENGTH], models=[MODEL])


def seen_of(choice: Choice) -> dict[str, float]:
    """Shares of softmax's heaviest keys, and of its mass, that a contender sees; and its keys."""
    (sample,) = samples()
    q, k = sample.q, repeat_heads(sample.k, sample.q.shape[1] // sample.k.shape[1])
    scores = q @ k.mT * q.shape[3] ** -0.5
    future = torch.ones(SEEN_LENGTH, SEEN_LENGTH, dtype=torch.bool).triu(1)
    exact = scores.masked_fill(future, -torch.inf).softmax(-1)[:, :, FIRST_ROW:]
    attention = choice.build(q.shape[1], q.shape[3], seed=0)
    seen = attention.weights(q, k, is_causal=True)[:, :, FIRST_ROW:] > 0
    top = exact.topk(TOP).indices
    return {
        "top_16": seen.gather(-1, top).double().mean().item(),
        "mass": (exact * seen).sum(-1).mean().item(),
        "keys": seen.sum(-1).double().mean().item(),
    }


def rows(lengths: list[int], keys: int) -> Iterator[dict[str, Any]]:
    texts = {name: read_text(name) for name in (SHAKESPEARE, PROSE)}
    where: Any = {"device": torch.device("cpu"), "dtype": torch.float32, "seed": 0}
    subject = CausalSubject(load(MODEL), texts, **where)
    exact_macs = subject.macs_of_mix({}, lengths[0])
    for choice in contenders(keys):
        start = time.perf_counter()
        mix = {} if choice is None else dict.fromkeys(range(subject.layers), choice)
        row: dict[str, Any] = {
            "attention": "exact" if choice is None else choice.label,
            "n": lengths[0],
            "macs_share": subject.macs_of_mix(mix, lengths[0]) / exact_macs,
            "seen": None if choice is None else seen_of(choice),
            "needle": {length: found(subject, choice, length) for length in lengths},
            "perplexity": {
                name: subject.measure(mix, Excerpt(name, FINAL, 1), lengths[:1])[
                    lengths[0]
                ].perplexity
                for name in texts
            },
        }
        yield {**row, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path("benchmarks/results/selected_quality.jsonl")
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--keys", type=int, default=512)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    where = environment(seed=0, device=torch.device("cpu"), dtype=torch.float32)
    with arguments.output.open("w") as file:
        for row in rows(arguments.lengths, arguments.keys):
            file.write(json.dumps({**row, "environment": where}) + "\n")
            file.flush()
            print(row, flush=True)


if __name__ == "__main__":
    main()
