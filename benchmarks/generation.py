"""Generation at length n: time per token and bytes of the past, keys and values that grow against
states that do not.

    python benchmarks/generation.py [--output benchmarks/results/generation.jsonl] [--lengths 1024
        2048 ...] [--figure docs/figures/generation.png]

A model of SmolLM2-135M's shape (30 layers, 9 heads of 64 that share 3 key-value heads), with random
weights, since neither time nor bytes depend on them; float32, batch 1, CPU. At each length every
contender's past is filled with n random tokens, then all generate greedily in turns, one token
each, so that a slow moment of the machine slows all alike. One layer's state is filled in chunks
and lent to the other layers: a state is a value. "transformers" is the model as it is, SDPA with
DynamicCache; the others are swapped and use `attnzoo.state_cache`. Rows are appended length by
length, and the lengths are gone through `--repeats` times, since a machine has slow minutes; a run
that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import attnzoo
from attnzoo.benchmarking.bench_rows import ResultFile
from attnzoo.benchmarking.environment import environment
from attnzoo.benchmarking.timing import interleave
from attnzoo.call import Call
from attnzoo.engines.softmax.cache import KeyValueCache

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
TOKENS, WARMUPS, CHUNK = 15, 2, 512
BUDGET = (
    60.0  # seconds of timing at one length, after which no token is begun, once there are 3 of each
)
MIB = 2**20
#: label: name and options of the attention; no name is the model as it is.
CONTENDERS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "transformers": (None, {}),
    "standard": ("standard", {}),
    "sliding_window": ("sliding_window", {"window": 256}),
    "linear": ("linear", {}),
    "performer": ("performer", {"num_features": 256}),
    "cosformer": ("cosformer", {"max_length": 2 * LENGTHS[-1]}),
    "retention": ("retention", {}),
}


@dataclass(frozen=True)
class Generated:
    """One contender at one length. held_bytes: of the whole cache, reserve included; needed_bytes:
    what the next token can read."""

    contender: str
    length: int
    median_seconds: float
    quartiles: tuple[float, float]
    held_bytes: int
    needed_bytes: int


def make_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
    }
    config = LlamaConfig(
        num_key_value_heads=3,
        max_position_embeddings=2 * LENGTHS[-1],
        tie_word_embeddings=True,
        **sizes,
    )
    return LlamaForCausalLM(config).eval()


def swapped_twin(model: Any, name: str, options: dict[str, Any]) -> Any:
    """A model of its own that shares the parameters."""
    return attnzoo.swap(
        copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}),
        name,
        **options,
    )


def filled_state(attention: attnzoo.Attention, length: int) -> Any:
    state = attention.init_state(1, kv_heads=3)
    for start in range(0, length, CHUNK):
        size = min(CHUNK, length - start)
        q, k, v = (torch.randn(1, heads, size, 64) for heads in (9, 3, 3))
        # Keys and values are kept whatever the queries were, and reading them all at every chunk
        # would take minutes.
        state = (
            state.append(Call(q, k, v))
            if isinstance(state, KeyValueCache)
            else attention.step(q, k, v, state)[1]
        )
    return state


def filled_cache(model: Any, name: str | None, length: int) -> Any:
    """A cache that has read `length` random tokens."""
    if name is None:
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        for layer in range(model.config.num_hidden_layers):
            cache.update(torch.randn(1, 3, length, 64), torch.randn(1, 3, length, 64), layer)
        return cache
    cache = attnzoo.state_cache(model)
    state = filled_state(cache.layers[0].attention, length)
    for layer in cache.layers:
        layer.state = state
    return cache


class Generator:
    """A model that generates one token with every call, greedily, behind a past of `length`
    tokens."""

    def __init__(self, model: Any, name: str | None, length: int) -> None:
        self.model = model
        self.cache = filled_cache(model, name, length)
        self.token = torch.zeros(1, 1, dtype=torch.long)

    def __call__(self) -> None:
        self.token = self.model(self.token, past_key_values=self.cache).logits[:, -1:].argmax(-1)

    @property
    def held_bytes(self) -> int:
        if hasattr(self.cache, "held_bytes"):
            return self.cache.held_bytes()
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

    @property
    def needed_bytes(self) -> int:
        attention = getattr(
            self.model.model.layers[0].self_attn, "attention_core", None
        ) or attnzoo.build("standard", heads=9, head_dim=64)
        cost = attention.cost(1, self.cache.get_seq_length(), kv_heads=3, is_causal=True)
        return len(self.cache.layers) * cost.state_bytes


def measure(models: dict[str, Any], length: int) -> list[Generated]:
    generators = {
        label: Generator(model, CONTENDERS[label][0], length) for label, model in models.items()
    }
    timings = interleave(generators, rounds=TOKENS, warmups=WARMUPS, budget=BUDGET)
    for label, generator in generators.items():
        seen = generator.cache.get_seq_length()
        assert seen == length + WARMUPS + len(timings[label].seconds), (
            f"{label} has seen {seen} tokens"
        )
    return [
        Generated(
            label,
            length,
            timings[label].median,
            timings[label].quartiles,
            generator.held_bytes,
            generator.needed_bytes,
        )
        for label, generator in generators.items()
    ]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the file, a half last line dropped."""
    if not path.exists():
        return []
    said = ResultFile(path).repair()
    if said:
        print(said)
    return [json.loads(line) for line in path.read_text().splitlines()]


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds a token, and MiB held, against the tokens before it."""
    import matplotlib

    from attnzoo.report.axes import log_axis
    from attnzoo.report.style import RC, new_figure, styles

    with matplotlib.rc_context(RC):
        figure = new_figure(8.6, 3.6)
        look = styles(
            (CONTENDERS[label][0] or "standard", label) for label in ("standard", *CONTENDERS)
        )
        panels = (
            ("milliseconds a token", lambda row: 1e3 * row["median_seconds"]),
            ("MiB of the past, reserve included", lambda row: row["held_bytes"] / MIB),
        )
        for axes, (title, value) in zip(figure.subplots(1, 2), panels, strict=True):
            for label in CONTENDERS:
                best: dict[int, float] = {}
                for row in rows:
                    if row["contender"] == label:
                        best[row["length"]] = min(value(row), best.get(row["length"], math.inf))
                lengths = sorted(best)
                axes.plot(
                    lengths,
                    [best[length] for length in lengths],
                    label=label,
                    **look[label].line_options(),
                )
            lengths = sorted({row["length"] for row in rows})
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
            axes.minorticks_off()
            log_axis(axes, "y", [value(row) for row in rows], lambda y: f"{y:,.4g}")
            axes.set_xlabel("tokens before it")
            axes.set_title(title, loc="left")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        names = [
            "transformers, DynamicCache" if label == "transformers" else f"{label}, state"
            for label in labels
        ]
        figure.legend(handles, names, loc="outside lower center", ncols=3)
        figure.savefig(path, dpi=150, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Time per generated token and bytes of the past, against the tokens before it."
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/generation.jsonl"))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument(
        "--repeats",
        type=int,
        default=2,
        help="times that each length is measured; the figure shows the fastest",
    )
    parser.add_argument("--figure", type=Path, default=None)
    arguments = parser.parse_args()
    done = Counter((row["length"], row["contender"]) for row in read_rows(arguments.output))
    times = {
        length: min(done[length, label] for label in CONTENDERS) for length in arguments.lengths
    }
    missing = [
        length
        for repeat in range(arguments.repeats)
        for length in arguments.lengths
        if times[length] <= repeat
    ]
    if missing:
        where = environment(seed=0, device=torch.device("cpu"), dtype=torch.float32)
        model = make_model()
        models = {
            label: swapped_twin(model, name, options) if name else model
            for label, (name, options) in CONTENDERS.items()
        }
        print(f"{'contender':16}{'length':>8}{'ms a token':>12}{'MiB held':>12}{'MiB needed':>12}")
        for length in missing:
            with torch.no_grad():
                rows = measure(models, length)
            append(arguments.output, [{**asdict(row), "environment": where} for row in rows])
            for row in rows:
                held, needed = row.held_bytes / MIB, row.needed_bytes / MIB
                print(
                    f"{row.contender:16}{length:>8,}{1e3 * row.median_seconds:>12.1f}"
                    f"{held:>12,.1f}{needed:>12,.1f}",
                    flush=True,
                )
    if arguments.figure:
        draw(read_rows(arguments.output), arguments.figure)


if __name__ == "__main__":
    main()
