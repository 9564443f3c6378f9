"""A ViT trained on digits, swapped to another attention, and fine-tuned.

Scikit-learn's digits are 8 by 8 pixels; each pixel is a patch, so that there are 64 patches and
[CLS]. The accuracy is told before the swap, right after it, and after as many steps again.
"""

from __future__ import annotations

import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import attnzoo

RATE = 1e-3


def digits() -> tuple[Tensor, Tensor]:
    """(1797, 1, 8, 8) from -1 to 1, and their labels, in an order that was drawn."""
    pixels, found = load_digits(return_X_y=True)
    order = torch.randperm(len(found))
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return images[order], torch.tensor(found)[order]


def train(model, images: Tensor, labels: Tensor, steps: int, rate: float) -> None:
    """AdamW, batches of 32, a rate that rises and falls."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (32,))
        loss = model(pixel_values=images[chosen], labels=labels[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model, images: Tensor, labels: Tensor) -> float:
    """Of the right answers."""
    model.eval()
    return float((model(pixel_values=images).logits.argmax(1) == labels).float().mean())


def main(arguments: list[str] | None = None) -> None:
    """Train exactly, swap, fine-tune."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--attention", default="linear", help="any bidirectional variant")
    parser.add_argument(
        "--steps", type=int, default=400, help="before the swap, and again after it"
    )
    parser.add_argument("--quick", action="store_true", help="two steps")
    given = parser.parse_args(arguments)
    steps = 2 if given.quick else given.steps
    torch.manual_seed(0)

    images, labels = digits()
    held, shown = slice(0, 360), slice(360, None)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=1,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            id2label={digit: str(digit) for digit in range(10)},
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    started = time.monotonic()
    train(model, images[shown], labels[shown], steps, RATE)
    print(f"exact attention, {steps} steps: {accuracy(model, images[held], labels[held]):.1%}")
    attnzoo.swap(model, given.attention)
    print(f"swapped to {given.attention}: {accuracy(model, images[held], labels[held]):.1%}")
    train(model, images[shown], labels[shown], steps, RATE)
    print(
        f"and fine-tuned for {steps} steps: {accuracy(model, images[held], labels[held]):.1%} "
        f"({time.monotonic() - started:.0f} s in all)"
    )


if __name__ == "__main__":
    main()
