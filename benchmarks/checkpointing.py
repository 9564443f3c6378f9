"""Gradient checkpointing: how much memory it gives back and how much time it takes, with every
attention of the zoo.

    python benchmarks/checkpointing.py [--output benchmarks/results/checkpointing.jsonl] [--variants
        standard linear ...]

A BERT of 4 layers, width 512, 8 heads of 64, inner width 2,048, with random weights, swapped;
float32, batch 1, CPU, 1,024 tokens, forward and backward of a mean of the last hidden states, with
and without Hugging Face's `gradient_checkpointing_enable()`. Peaks are sums of the allocator's
events beyond what was there before (parameters and their gradients, which exist already, are not in
them). Times are medians of interleaved rounds; the ratio is the median of the rounds' ratios. Rows
are appended variant by variant; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch

import attnzoo
from attnzoo.benchmarking.bench_rows import ResultFile
from attnzoo.benchmarking.environment import environment
from attnzoo.benchmarking.peak_memory import peak_bytes
from attnzoo.benchmarking.timing import interleave
from attnzoo.registry import sized, spec_of

LENGTH, ROUNDS = 1024, 3


def make_model(name: str) -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
    }
    config = BertConfig(
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **sizes,
    )
    return attnzoo.swap(
        BertModel(config, add_pooling_layer=False), name, **sized(name, LENGTH)
    ).train()


class Training:
    """One forward and backward of a model, with checkpointing or without."""

    def __init__(self, model: Any, checkpointing: bool) -> None:
        self.model = model
        self.checkpointing = checkpointing
        self.ids = torch.arange(LENGTH)[None] + 1000

    def __call__(self) -> None:
        if self.checkpointing:
            self.model.gradient_checkpointing_enable()
        else:
            self.model.gradient_checkpointing_disable()
        self.model.zero_grad(set_to_none=False)
        self.model(self.ids, use_cache=False).last_hidden_state.square().mean().backward()


def measure(name: str) -> dict[str, Any]:
    model = make_model(name)
    plain, checkpointed = Training(model, False), Training(model, True)
    plain()  # makes the gradients, so that no peak counts them, and warms up
    expected = [
        parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
    ]
    checkpointed()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    del expected, found
    peaks = {"plain": peak_bytes(plain), "checkpointed": peak_bytes(checkpointed)}
    times = interleave({"plain": plain, "checkpointed": checkpointed}, rounds=ROUNDS, warmups=0)
    ratios = [
        after / before
        for after, before in zip(times["checkpointed"].seconds, times["plain"].seconds, strict=True)
    ]
    return {
        "variant": name,
        "length": LENGTH,
        "peak_bytes": peaks,
        "median_seconds": {label: timing.median for label, timing in times.items()},
        "memory_ratio": round(peaks["checkpointed"] / peaks["plain"], 3),
        "time_ratio": round(statistics.median(ratios), 3),
        "same_gradients": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Memory given back and time taken by gradient checkpointing."
    )
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/checkpointing.jsonl")
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[name for name in attnzoo.names() if spec_of(name).bidirectional],
    )
    arguments = parser.parse_args()
    path: Path = arguments.output
    path.parent.mkdir(parents=True, exist_ok=True)
    said = ResultFile(path).repair()
    if said:
        print(said)
    done = (
        {json.loads(line)["variant"] for line in path.read_text().splitlines()}
        if path.exists()
        else set()
    )
    where = environment(seed=0, device=torch.device("cpu"), dtype=torch.float32)
    print(
        f"{'variant':16}{'peak, MiB':>12}{'checkpointed':>14}{'ratio':>8}"
        f"{'seconds':>10}{'checkpointed':>14}{'ratio':>8}  same gradients"
    )
    for name in arguments.variants:
        if name in done:
            continue
        row = measure(name)
        with path.open("a") as file:
            file.write(json.dumps({**row, "environment": where}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        memory, seconds = (
            [row[key][label] for label in ("plain", "checkpointed")]
            for key in ("peak_bytes", "median_seconds")
        )
        print(
            f"{name:16}{memory[0] / 2**20:>12,.0f}{memory[1] / 2**20:>14,.0f}"
            f"{row['memory_ratio']:>8.2f}"
            f"{seconds[0]:>10.2f}{seconds[1]:>14.2f}{row['time_ratio']:>8.2f}  "
            f"{'yes' if row['same_gradients'] else 'no'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
