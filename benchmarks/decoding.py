"""A step of decoding, one token behind 1,024: every variant that decodes beside exact attention's
own step; 8 heads of 64, batch 1, float32, CPU.

    OMP_PROC_BIND=true python -m benchmarks.decoding [--output FILE] [--rounds N] [VARIANT ...]

In every round each contender takes some steps on from where it is, so that states grow alike; a
ratio is the median over the rounds of one round's ratio, with its quartiles: 0.5 is half of the
time that a step of `standard` takes. What a state must still do now and then, such as moving to a
longer buffer, is in the turns. Rows are compared with one forward of the reference in the same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnzoo
from attnzoo.attention import Attention
from attnzoo.benchmarking.environment import environment
from attnzoo.benchmarking.timing import disagreement, interleave
from attnzoo.registry import spec_of
from benchmarks.selected import quotients

HEADS, HEAD_DIM, BEHIND, STEPS, ROUNDS, WARMUPS = 8, 64, 1024, 8, 41, 2
EXACT = "standard"
OPTIONS: dict[str, dict[str, Any]] = {
    "cosformer": {"max_length": 4096},
    "indexed": {"index_heads": 1, "index_dim": 32},
    "sliding_window": {"window": 128},
}


def variants() -> list[str]:
    """All that decode, exact attention first."""
    names = [name for name in attnzoo.names() if spec_of(name).decodes]
    return [EXACT, *(name for name in names if name != EXACT)]


def drawn(attention: Attention, length: int) -> dict[str, Tensor]:
    """q, k, v and what else the variant needs, of `length` tokens."""
    sizes = {"batch": 1, "heads": HEADS, "kv_heads": HEADS, "queries": length, "keys": length}
    sizes |= {"width": HEAD_DIM, "value_width": HEAD_DIM, "levels": length.bit_length() + 1}
    sizes |= attention.input_sizes
    found = {name: torch.randn(1, HEADS, length, HEAD_DIM) for name in "qkv"}
    if any(one.name == "beta" for one in attention.spec.inputs):
        found["k"] = torch.nn.functional.normalize(found["k"], dim=-1)
    for one in attention.spec.inputs:
        own = any(axis in attention.input_sizes for axis in one.names)
        if one.dtype == "float" and (one.required or one.is_projected or own):
            x = torch.randn([sizes[name] for name in one.names])
            found[one.name] = x if one.activation is None else one.activation(x + 3)
    return found


class Decoder:
    """A variant that takes step after step behind a prompt."""

    def __init__(self, name: str, steps: int) -> None:
        """steps: of one token that it will take."""
        options = OPTIONS.get(name, {})
        self.attention = attnzoo.build(name, heads=HEADS, head_dim=HEAD_DIM, **options)
        self.whole = drawn(self.attention, BEHIND + steps)
        self.axes = {one.name: one.names for one in self.attention.spec.inputs}
        self.seen, self.rows = 0, []
        self.state = self.attention.init_state(1)
        self.take(BEHIND)
        self.parts = [self.part(self.seen + i, 1) for i in range(self.length - self.seen)]

    @property
    def length(self) -> int:
        return self.whole["q"].shape[2]

    def part(self, start: int, count: int) -> dict[str, Tensor]:
        """What belongs to some tokens, as a caller would bring it: tensors of their own."""
        own = {"q": ("", "", "queries"), "k": ("", "", "keys"), "v": ("", "", "keys"), **self.axes}
        found = {}
        for name, x in self.whole.items():
            for dim, axis in enumerate(own[name]):
                if axis in ("queries", "keys"):
                    x = x.narrow(dim, start, count).contiguous()
            found[name] = x
        return found

    def take(self, count: int, given: dict[str, Tensor] | None = None) -> None:
        given = self.part(self.seen, count) if given is None else given
        q, k, v, *_ = given.values()
        own = {name: x for name, x in given.items() if name not in ("q", "k", "v")}
        rows, self.state = self.attention.step(q, k, v, self.state, **own)
        self.rows.append(rows)
        self.seen += count

    def turn(self) -> None:
        """Some steps of one token."""
        for _ in range(STEPS):
            self.take(1, self.parts[self.seen - BEHIND])

    def mistake(self) -> str | None:
        """What is wrong in the rows of all steps, beside one forward of the reference."""
        given = self.part(0, self.seen)
        self.attention.backend = "reference"
        q, k, v, *_ = given.values()
        own = {name: x for name, x in given.items() if name not in ("q", "k", "v")}
        wanted = self.attention(q, k, v, is_causal=True, **own)
        self.attention.backend = "auto"
        return disagreement(torch.cat(self.rows, 2)[:, :, BEHIND:], wanted[:, :, BEHIND:])


def rows(names: list[str], rounds: int) -> list[dict[str, Any]]:
    """One for each variant, all timed in the same rounds."""
    decoders = {name: Decoder(name, STEPS * (rounds + WARMUPS)) for name in names}
    turns: dict[str, Callable[[], None]] = {name: one.turn for name, one in decoders.items()}
    timings = interleave(turns, rounds=rounds, warmups=WARMUPS)
    found = []
    for name, one in decoders.items():
        ratio, quartiles = quotients(timings[name], timings[EXACT])
        found.append(
            {
                "variant": name,
                "options": OPTIONS.get(name, {}),
                "backend": one.attention.last_backend,
                "behind": [BEHIND, one.seen],
                "seconds": timings[name].median / STEPS,
                "over_exact": [ratio, quartiles],
                "mistake": one.mistake(),
            }
        )
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="*", help="beside exact attention; all by default")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/decoding.jsonl"))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    where = environment(seed=0, device=torch.device("cpu"), dtype=torch.float32)
    names = list(dict.fromkeys([EXACT, *arguments.variants])) if arguments.variants else variants()
    found = rows(names, arguments.rounds)
    with arguments.output.open("w") as file:
        for row in found:
            file.write(json.dumps({**row, "environment": where}) + "\n")
            ratio, (low, high) = row["over_exact"]
            print(
                f"{row['variant']:20} {row['backend']:12} {row['seconds'] * 1e3:8.3f} ms "
                f"{ratio:6.2f} ({low:.2f}-{high:.2f})  {row['mistake'] or 'right'}"
            )


if __name__ == "__main__":
    main()
