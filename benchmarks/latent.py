"""Decoding with multi-head latent attention behind n tokens: absorbed, from the latents alone,
beside the same weights with a cache of expanded keys and values, and transformers' own layer.

    OMP_PROC_BIND=true python benchmarks/latent.py [--output FILE] [--sizes lite v3]
        [--lengths 4096 32768] [--contenders expanded]

One layer, batch 1, float32, CPU, random weights, at the sizes of DeepSeek-V2-Lite (16 heads) and
DeepSeek-V3 (128 heads). Every contender decodes one token in turn, so that a slow moment of the
machine slows all alike; a ratio is the median over the rounds of one round's ratio. The rows of
the first token are compared in the same run.

    absorbed: `attnzoo.LatentAttention.step`
    expanded: keys and values of every head kept; products, softmax, products
    expanded_sdpa: the same by torch's SDPA
    transformers: DeepseekV3Attention with DynamicCache, which expands all latents at every token
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.benchmarking.environment import environment
from attnzoo.benchmarking.timing import Timing, interleave
from attnzoo.conventions.latent_cache import from_cache
from attnzoo.integrations.huggingface.latent.latent_layer import latent_layer
from attnzoo.integrations.huggingface.latent.latent_states import latent_state

LENGTHS = (4096, 16384, 32768)
SIZES: dict[str, dict[str, Any]] = {
    "lite": {"hidden_size": 2048, "num_attention_heads": 16, "q_lora_rank": None},
    "v3": {"hidden_size": 7168, "num_attention_heads": 128, "q_lora_rank": 1536},
}
ROUNDS, WARMUPS, CHUNK = 9, 2, 1024
MIB = 2**20


class Expanded:
    """Decoding of a `LatentAttention` with keys and values of every head in the cache."""

    def __init__(self, layer: Any, kept: Tensor, held: tuple[Tensor, Tensor], by_sdpa: bool):
        """held: memory for the keys and values of all heads, which contenders may share"""
        self.layer, self.core, self.by_sdpa = layer, layer.attention, by_sdpa
        self.length, (self.k, self.v) = kept.shape[2], held
        for start in range(0, self.length, CHUNK):
            part = slice(start, min(start + CHUNK, self.length))
            self.k[:, :, part], self.v[:, :, part] = self.core._expanded(kept[:, :, part])

    def __call__(self, x: Tensor) -> Tensor:
        layer, end = self.layer, self.length + 1
        q, kept, _ = layer.latent(x, x, "b l (p h d) -> p b h l d")
        q, kept = layer.rotary(q, kept, torch.tensor([self.length]))
        new = slice(self.length, end)
        self.k[:, :, new], self.v[:, :, new] = self.core._expanded(kept)
        self.length = end
        k, v, scale = self.k[:, :, :end], self.v[:, :, :end], self.core.engine.scale
        if self.by_sdpa:
            rows = F.scaled_dot_product_attention(q, k, v, scale=scale)
        else:
            rows = ((q * scale) @ k.mT).softmax(-1) @ v
        return layer.out_proj(rows.transpose(1, 2).flatten(2))

    @property
    def held_bytes(self) -> int:
        return sum(x[:, :, : self.length].numel() * x.itemsize for x in (self.k, self.v))


class Absorbed:
    """Decoding of a `LatentAttention` by its own step."""

    def __init__(self, layer: Any, state: Any) -> None:
        self.layer, self.state = layer, state

    def __call__(self, x: Tensor) -> Tensor:
        out, self.state = self.layer.step(x, self.state)
        return out

    @property
    def held_bytes(self) -> int:
        return self.state.core.elements() * 4


class Transformers:
    """Decoding of transformers' layer with its cache."""

    def __init__(self, module: Any, rotary: Any, cache: Any) -> None:
        self.module, self.rotary, self.cache = module, rotary, cache

    def __call__(self, x: Tensor) -> Tensor:
        position = torch.tensor([[self.cache.get_seq_length()]])
        turns = self.rotary(x, position)
        how = {"position_embeddings": turns, "attention_mask": None}
        return self.module(x, past_key_values=self.cache, **how)[0]

    @property
    def held_bytes(self) -> int:
        return sum(one.keys.nbytes + one.values.nbytes for one in self.cache.layers)


def contenders(sizes: dict[str, Any], length: int) -> dict[str, Any]:
    """All behind the same `length` tokens."""
    from transformers import DeepseekV3Config, DynamicCache
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    torch.manual_seed(0)
    config: Any = DeepseekV3Config(
        **sizes,
        num_key_value_heads=sizes["num_attention_heads"],
        num_hidden_layers=1,
        max_position_embeddings=2 * LENGTHS[-1],
    )
    config._attn_implementation = "sdpa"
    module = theirs.DeepseekV3Attention(config, 0).eval()
    cache = DynamicCache(config=config)
    layer = latent_layer(module)
    keys, values = torch.randn(1, 1, length, layer.attention.rank), torch.randn(1, 1, length, 64)
    cache.update(keys, values, 0)
    kept = from_cache(keys, values, interleaved=True)
    core = layer.attention
    slots = (1, core.heads, length + ROUNDS + WARMUPS + 2)
    both = torch.zeros(*slots, core.head_dim), torch.zeros(*slots, core.value_dim)
    return {
        "absorbed": Absorbed(layer, latent_state(layer, keys, values)),
        "expanded": Expanded(layer, kept, both, by_sdpa=False),
        "expanded_sdpa": Expanded(layer, kept, both, by_sdpa=True),
        "transformers": Transformers(module, theirs.DeepseekV3RotaryEmbedding(config), cache),
    }


def ratio(of: Timing, to: Timing) -> dict[str, Any]:
    """The median of the rounds' ratios and its quartiles."""
    each = [a / b for a, b in zip(of.seconds, to.seconds, strict=True)]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return {"ratio": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


@torch.no_grad()
def rows(name: str, length: int, wanted: list[str] | None) -> Iterator[dict[str, Any]]:
    """One for each contender. wanted: their names beside "absorbed"; None: all."""
    found = {
        label: one
        for label, one in contenders(SIZES[name], length).items()
        if wanted is None or label in ("absorbed", *wanted)
    }
    x = torch.randn(1, 1, SIZES[name]["hidden_size"])
    first = {label: one(x) for label, one in found.items()}
    calls: dict[str, Callable[[], Any]] = {
        label: lambda one=one: one(x) for label, one in found.items()
    }
    timings = interleave(calls, rounds=ROUNDS, warmups=WARMUPS)
    for label, one in found.items():
        yield {
            "sizes": name,
            "length": length,
            "contender": label,
            "ran": one.layer.attention.last_backend if label == "absorbed" else label,
            "median_ms": round(1e3 * timings[label].median, 2),
            "over_absorbed": ratio(timings[label], timings["absorbed"]),
            "held_mib": round(one.held_bytes / MIB, 1),
            "numbers_a_token": round(one.held_bytes / 4 / (length + 1)),
            "largest_difference": float((first[label] - first["absorbed"]).abs().max()),
            "largest_row": float(first["absorbed"].abs().max()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/latent.jsonl"))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["lite"])
    parser.add_argument("--contenders", nargs="+", help="others are left out; default: all")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    given = parser.parse_args()
    where = environment(seed=0, device=torch.device("cpu"), dtype=torch.float32)
    with given.output.open("a", encoding="utf-8") as file:
        for name in given.sizes:
            for length in given.lengths:
                for row in rows(name, length, given.contenders):
                    print(row, flush=True)
                    file.write(json.dumps({**row, "environment": where}) + "\n")


if __name__ == "__main__":
    main()
