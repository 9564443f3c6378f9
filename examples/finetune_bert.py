"""A pretrained BERT with a window instead of full attention, fine-tuned on passages of plays.

MiniLM-L6 reads 256 tokens of Shakespeare and must tell a tragedy from a comedy. Its attention is
swapped to a window of 64 keys on each side with a global [CLS]; two upper layers and a classifier
are trained. Plays that are tested on are not trained on.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn

import attnzoo
from attnzoo.fidelity.pretrained import load
from attnzoo.texts.plays import play

KINDS = (
    ("hamlet", "macbeth", "king-lear", "romeo-and-juliet"),
    ("twelfth-night", "as-you-like-it", "the-tempest", "much-ado-about-nothing"),
)
HELD_OUT = ("othello", "a-midsummer-night-s-dream")


def passages(tokenizer, titles: tuple[str, ...], label: int, length: int) -> tuple[Tensor, Tensor]:
    """Passages of `length` tokens that share no word, and their label, once for each."""
    ids = [tokenizer(play(title), add_special_tokens=False)["input_ids"] for title in titles]
    flat = torch.tensor([token for one in ids for token in one])
    whole = flat[: len(flat) // (length - 2) * (length - 2)].view(-1, length - 2)
    ends = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id])
    cls, sep = (end.expand(len(whole), 1) for end in ends)
    return torch.cat([cls, whole, sep], 1), torch.full((len(whole),), label)


class Classifier(nn.Module):
    """The encoder and one linear layer over its [CLS]."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids=ids).last_hidden_state[:, 0])


@torch.no_grad()
def accuracy(model: nn.Module, ids: Tensor, labels: Tensor) -> float:
    """Of the right answers, with the model as in use."""
    model.eval()
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(ids.split(16), labels.split(16), strict=True)
    )
    return right / len(labels)


def main(arguments: list[str] | None = None) -> None:
    """Swap, train, test."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--attention", default="longformer", help="any bidirectional variant")
    parser.add_argument("--window", type=int, default=64, help="keys on each side")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--quick", action="store_true", help="three steps on short passages")
    given = parser.parse_args(arguments)
    length, steps, tests = (48, 3, 8) if given.quick else (256, given.steps, 64)
    torch.manual_seed(0)

    pretrained = load("MiniLM-L6")
    encoder, tokenizer = pretrained.model, pretrained.tokenizer
    tokenizer.model_max_length = 10**9  # whole plays are cut below
    options: dict[str, Any] = (
        {"window": given.window, "global_tokens": 1} if given.attention == "longformer" else {}
    )
    attnzoo.swap(encoder, given.attention, **options)

    model = Classifier(encoder, encoder.config.hidden_size)
    encoder.requires_grad_(False)
    encoder.encoder.layer[-2:].requires_grad_(True)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4)

    parts = [passages(tokenizer, titles, label, length) for label, titles in enumerate(KINDS)]
    ids, labels = (torch.cat(both) for both in zip(*parts, strict=True))
    held = [passages(tokenizer, (title,), label, length) for label, title in enumerate(HELD_OUT)]
    each = min(tests, *(len(x) for x, _ in held))
    test_ids, test_labels = (
        torch.cat(both) for both in zip(*[(x[:each], y[:each]) for x, y in held], strict=True)
    )

    started = time.monotonic()
    for step in range(steps):
        model.train()
        chosen = torch.randint(len(ids), (8,))
        loss = nn.functional.cross_entropy(model(ids[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3}: loss {float(loss.detach()):.3f}")
    found = accuracy(model, test_ids, test_labels)
    print(
        f"{given.attention}: {found:.0%} of {len(test_labels)} passages of plays that were held "
        f"out are told right, after {steps} steps in {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
