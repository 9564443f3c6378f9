"""Recurrent layers of transformers' hybrids, measured: the torch code that transformers falls back
to beside this library's engine in its place.

    python benchmarks/fallbacks.py [--output benchmarks/results/fallbacks.jsonl] [--length 4096]
        [--rounds 5]

"compiled" is this library's engine with its backend `native`, where that can be compiled;
"projections" are a layer's matrices alone, which no engine can hasten.

Batch 1, 8 heads of 64, float32, CPU. `rule` is the function alone, `layer` the whole layer of a
model of width 512 with its projections and its short convolution. Results are compared before
anything is timed; times are medians over interleaved rounds, peaks are the allocator's.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before torch is imported: unbound, two threads may come to share one core.
os.environ.setdefault("OMP_PROC_BIND", "true")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.kimi_linear import modeling_kimi_linear as kimi_linear
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.minimax import modeling_minimax as minimax
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

import attnzoo
from attnzoo.benchmarking.environment import environment
from attnzoo.benchmarking.peak_memory import peak_bytes
from attnzoo.benchmarking.timing import interleave
from attnzoo.conventions.gated_delta import gated_delta_rule
from attnzoo.conventions.mamba2_scan import mamba2_chunk_scan
from attnzoo.engines.native import library

HEADS, HEAD_DIM = 8, 64
WIDTH = HEADS * HEAD_DIM
OURS, NATIVE, THEIRS, PROJECTIONS = "attnzoo", "compiled", "transformers", "projections"
SAME = (OURS, NATIVE)  # whose results must be those of transformers
LIMIT = {"forward": 1e-4, "forward+backward": 1e-3}  # of ||ours - theirs|| / ||theirs||, float32

#: A call: the tensors that gradients are taken of, and what makes the output of them.
Contender = tuple[list[Tensor], Callable[[], Tensor]]


def rules(length: int) -> Iterator[tuple[str, dict[str, Contender]]]:
    """The functions alone, by name."""
    for name, theirs, channels in (
        ("gated_deltanet", qwen3_next.torch_chunk_gated_delta_rule, ()),
        ("kda", kimi_linear.chunk_kimi_delta_attention, (HEAD_DIM,)),
    ):
        torch.manual_seed(0)
        shape = (1, length, HEADS)
        given = [torch.randn(*shape, HEAD_DIM) for _ in range(3)]
        given += [F.logsigmoid(torch.randn(*shape, *channels) + 3), torch.rand(shape)]
        normed = {"use_qk_l2norm_in_kernel": True}
        yield (
            name,
            {
                THEIRS: _rule(theirs, given, **normed),
                OURS: _rule(gated_delta_rule, given, **normed),
            },
        )
    torch.manual_seed(0)
    given = [torch.randn(1, length, HEADS, HEAD_DIM), torch.rand(1, length, HEADS)]
    given += [-torch.rand(HEADS), *(torch.randn(1, length, 1, HEAD_DIM) for _ in range(2))]
    states = {"return_final_states": True}  # without them transformers' function gives no tuple
    yield (
        "mamba2",
        {
            THEIRS: _rule(mamba2.mamba2_chunk_scan, given, chunk_size=256, **states),
            OURS: _rule(mamba2_chunk_scan, given),
        },
    )


def _rule(
    function: Callable[..., tuple[Tensor, Any]], given: list[Tensor], **options: Any
) -> Contender:
    own = [x.clone().requires_grad_() for x in given]
    return own, lambda: function(*own, **options)[0]


def layers(length: int) -> Iterator[tuple[str, dict[str, Contender]]]:
    """Whole layers, by the family's name."""
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 1}
    sizes["layer_types"] = ["linear_attention"]
    heads: dict[str, Any] = {
        f"linear_{kind}": number
        for kind, number in (
            ("num_key_heads", HEADS),
            ("num_value_heads", HEADS),
            ("key_head_dim", HEAD_DIM),
            ("value_head_dim", HEAD_DIM),
        )
    }
    torch.manual_seed(0)
    layer = qwen3_next.Qwen3NextGatedDeltaNet(qwen3_next.Qwen3NextConfig(**sizes, **heads), 0)
    x = torch.randn(1, length, WIDTH)
    theirs, ours = layer, copy.deepcopy(layer)
    attnzoo.replace_fallbacks(ours)
    yield (
        "qwen3_next",
        {
            THEIRS: _layer(theirs, x),
            OURS: _layer(ours, x),
            PROJECTIONS: _layer(layer, x, projected),
        },
    )
    layer = minimax.MiniMaxLightningAttention(
        minimax.MiniMaxConfig(
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            layer_types=["linear_attention"],
        ),
        0,
    )
    theirs, ours = layer, copy.deepcopy(layer)
    attnzoo.replace_fallbacks(ours)
    yield (
        "minimax",
        {
            THEIRS: _layer(theirs, x, lightning),
            OURS: _layer(ours, x, lightning),
            PROJECTIONS: _layer(layer, x, projected),
        },
    )


def lightning(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, position_embeddings=None, attention_mask=None)[0]


def projected(layer: nn.Module, x: Tensor) -> Tensor:
    """A number made of the products of every matrix of the layer with as many tokens."""
    matrices = [one for one in layer.modules() if isinstance(one, nn.Linear)]
    return torch.stack([one(x[..., : one.in_features]).mean() for one in matrices]).sum()


def _layer(
    layer: nn.Module, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__
) -> Contender:
    own = x.clone().requires_grad_()
    return [own, *layer.parameters()], lambda: call(layer, own)


@contextmanager
def native(is_taken: bool) -> Iterator[None]:
    """Inside, backend="auto" takes or leaves what is compiled."""
    before = library.not_compiled
    library.not_compiled = lambda: None if is_taken else "it has no turn"
    try:
        yield
    finally:
        library.not_compiled = before


def passes(contender: Contender, learns: bool, *, compiled: bool) -> Callable[[], list[Tensor]]:
    """One pass, which returns its results."""
    inputs, call = contender

    def run() -> list[Tensor]:
        with torch.set_grad_enabled(learns), native(compiled):
            out = call()
        return (
            list(torch.autograd.grad(out.square().sum(), inputs, allow_unused=True))
            if learns
            else [out]
        )

    return run


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest ||ours - theirs|| / ||theirs||."""
    return max(
        float((x - y).norm() / y.norm().clamp(min=1e-30)) for x, y in zip(ours, theirs, strict=True)
    )


def rows(length: int, rounds: int) -> Iterator[dict[str, Any]]:
    for what, found in (("rule", rules(length)), ("layer", layers(length))):
        for name, contenders in found:
            for phase in ("forward", "forward+backward"):
                learns = phase == "forward+backward"
                calls = {
                    who: passes(one, learns, compiled=False) for who, one in contenders.items()
                }
                if library.cannot_compile() is None:
                    calls[NATIVE] = passes(contenders[OURS], learns, compiled=True)
                wanted = calls[THEIRS]()
                error = max(distance(calls[who](), wanted) for who in calls if who in SAME)
                if error > LIMIT[phase]:
                    raise SystemExit(f"{what} {name}, {phase}: results differ by {error:.1e}")
                timings = interleave(calls, rounds=rounds)
                for who, timing in timings.items():
                    yield {
                        "what": what,
                        "name": name,
                        "who": who,
                        "n": length,
                        "phase": phase,
                        "seconds": timing.median,
                        "quartiles": list(timing.quartiles),
                        "rounds": len(timing.seconds),
                        "times_theirs": timing.median / timings[THEIRS].median,
                        "peak_bytes": peak_bytes(calls[who]),
                        "distance": error,
                    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/fallbacks.jsonl"))
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    settings = parser.parse_args()
    where = environment(seed=0, device=torch.device("cpu"), dtype=torch.float32)
    with settings.output.open("w") as file:
        for row in rows(settings.length, settings.rounds):
            file.write(json.dumps({**row, "environment": where}) + "\n")
            file.flush()
            low, high = (x * 1e3 for x in row["quartiles"])
            print(
                f"{row['what']:6}{row['name']:16}{row['who']:14}{row['phase']:18}"
                f"{row['seconds'] * 1e3:10.1f} ms ({low:.1f} to {high:.1f})"
                f"{row['peak_bytes'] / 2**20:9.1f} MiB   distance {row['distance']:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
