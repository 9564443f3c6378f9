"""A pretrained BERT with a window instead of full attention, fine-tuned on passages of plays.

MiniLM-L6 reads 192 tokens and must tell from which of four plays they are. Its attention is swapped
to a window of 64 keys on each side with a global [CLS]; the two upper layers and a classifier are
trained. The last fifth of each play is tested on and not trained on.
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

PLAYS = ("hamlet", "macbeth", "twelfth-night", "the-tempest")


def passages(tokenizer, title: str, length: int) -> Tensor:
    """A play in passages of `length` tokens that share no word, in order: (passages, length)."""
    flat = torch.tensor(tokenizer(play(title), add_special_tokens=False)["input_ids"])
    whole = flat[: len(flat) // (length - 2) * (length - 2)].view(-1, length - 2)
    ends = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id])
    cls, sep = (end.expand(len(whole), 1) for end in ends)
    return torch.cat([cls, whole, sep], 1)


def split(tokenizer, length: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Passages and the number of their play: to train on, and to test on."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for title in PLAYS:
        whole = passages(tokenizer, title, length)
        last = len(whole) - len(whole) // 5
        found[0].append(whole[:last])
        found[1].append(whole[last:])
    first, second = (
        (torch.cat(part), torch.cat([torch.full((len(x),), i) for i, x in enumerate(part)]))
        for part in found
    )
    return first, second


class Classifier(nn.Module):
    """The encoder and one linear layer over its [CLS]."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, len(PLAYS))

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
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="three steps on short passages")
    given = parser.parse_args(arguments)
    length, steps, tests = (48, 3, 16) if given.quick else (192, given.steps, 128)
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

    (ids, labels), (test_ids, test_labels) = split(tokenizer, length)
    chosen = torch.randperm(len(test_ids))[:tests]
    test_ids, test_labels = test_ids[chosen], test_labels[chosen]

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
        f"{given.attention}: {found:.0%} of {len(test_labels)} passages that were held out are "
        f"told right, after {steps} steps in {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
