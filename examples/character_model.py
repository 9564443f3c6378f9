"""A model of characters with a gated delta rule in every layer, trained and sampled from its state.

Two layers of `attnzoo.MultiheadAttention` read Shakespeare; the gates are projected by the layers.
Sampling carries a matrix a head instead of all keys and values.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import cast

import torch
from torch import Tensor, nn

import attnzoo
from attnzoo.texts.plays import play

WIDTH, HEADS, LAYERS = 64, 4, 2


class Block(nn.Module):
    """Pre-norm: attention, then a feed-forward network."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.attention = attnzoo.MultiheadAttention(
            WIDTH, HEADS, batch_first=True, attention=attention, short_convolution=4
        )
        self.mixed = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        read = self.norms[0](x)
        x = x + self.attention(read, read, read, is_causal=True, need_weights=False)[0]
        return x + self.mixed(self.norms[1](x))

    def step(self, x: Tensor, state):
        """As forward, of new tokens behind a state."""
        rows, state = self.attention.step(self.norms[0](x), state)
        x = x + rows
        return x + self.mixed(self.norms[1](x)), state


class CharacterModel(nn.Module):
    """Next characters from those before."""

    def __init__(self, characters: int, attention: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        self.blocks = nn.ModuleList([Block(attention) for _ in range(LAYERS)])
        self.out = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.out(x)

    @torch.no_grad()
    def sample(self, prompt: Tensor, count: int) -> Tensor:
        """`count` characters after a prompt, (1, length), one at a time from the layers' states."""
        blocks = cast(list[Block], list(self.blocks))
        states = [block.attention.init_state(1) for block in blocks]
        drawn, new = prompt, prompt
        for _ in range(count):
            x = self.embedding(new)
            for place, block in enumerate(blocks):
                x, states[place] = block.step(x, states[place])
            odds = (self.out(x)[:, -1] / 0.7).softmax(-1)
            new = torch.multinomial(odds, 1)
            drawn = torch.cat([drawn, new], 1)
        return drawn


def main(arguments: list[str] | None = None) -> None:
    """Train, test on another play, sample."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--attention", default="gated_deltanet", help="any causal variant")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--quick", action="store_true", help="three steps")
    given = parser.parse_args(arguments)
    steps, length, count = (3, 32, 20) if given.quick else (given.steps, 128, 300)
    torch.manual_seed(0)

    text, other = play("othello") + play("macbeth") + play("king-lear"), play("hamlet")
    alphabet = sorted(set(text + other))
    codes = {character: code for code, character in enumerate(alphabet)}
    train, test = (torch.tensor([codes[one] for one in what]) for what in (text, other))

    model = CharacterModel(len(alphabet), given.attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps + 1)
    started = time.monotonic()
    for step in range(steps):
        starts = torch.randint(len(train) - length - 1, (16,))
        batch = torch.stack([train[start : start + length + 1] for start in starts])
        loss = nn.functional.cross_entropy(
            model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:3}: {float(loss.detach()) / math.log(2):.2f} bits per character")

    model.eval()
    held = test[: 40 * (length + 1)].view(40, length + 1)
    with torch.no_grad():
        bits = nn.functional.cross_entropy(model(held[:, :-1]).flatten(0, 1), held[:, 1:].flatten())
    print(
        f"{given.attention}: {float(bits) / math.log(2):.2f} bits per character on Hamlet, after "
        f"{steps} steps in {time.monotonic() - started:.0f} s"
    )
    prompt = torch.tensor([[codes[one] for one in "HAMLET:\n"]])
    print("".join(alphabet[code] for code in model.sample(prompt, count)[0].tolist()))


if __name__ == "__main__":
    main()
