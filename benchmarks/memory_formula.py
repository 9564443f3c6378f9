"""The allocator's peaks against the closed forms of `Attention.cost`: a forward without gradients, one that records, and both passes.

    python benchmarks/memory_formula.py [--output benchmarks/results/memory_formula.jsonl] [--lengths 1024 4096 ...] [--device cpu]

Two heads of 64, float32; peaks are beyond the inputs, and the ratio is peak over formula. forward: `Cost.forward_bytes`. recording: the
larger of that and of what autograd holds after the forward, `Cost.kept_bytes`, without q, k and v and with the output. both:
`Cost.training_bytes`.

On a GPU (--device cuda) the peaks are those of torch's caching allocator. The formulas are of the CPU's kernels, so the ratios say
how far they carry; this has not run on a GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import attnzoo
from attnzoo import Attention
from attnzoo.bench.memory import peak_bytes
from attnzoo.engines.engine import Cost
from attnzoo.environment import environment
from attnzoo.registry import sized, spec_of

LENGTHS = (1024, 4096, 16384, 65536)
QUADRATIC_LENGTHS = (1024, 4096, 16384)  # where the time is quadratic, so that the study ends
HEADS, HEAD_DIM = 2, 64
KINDS = ("forward", "recording", "both")


def measured(attention: Attention, n: int, is_causal: bool, kind: str, device: torch.device) -> int:
    """Peak bytes of one kind of run."""
    q, k, v = (torch.randn(1, HEADS, n, HEAD_DIM, device=device, requires_grad=kind != "forward") for _ in range(3))
    upstream = torch.randn(1, HEADS, n, HEAD_DIM, device=device)

    def run() -> object:
        out = attention(q, k, v, is_causal=is_causal)
        if kind == "both":
            out.backward(upstream)
        return out

    attention.zero_grad()
    with torch.set_grad_enabled(kind != "forward"):
        return peak_bytes(run, device)


def formulas(cost: Cost, n: int, family: str) -> dict[str, int | None]:
    """Bytes of each kind by the closed forms; None where there is none."""
    recording = None
    if cost.kept_bytes is not None and cost.forward_bytes is not None:
        tensor = HEADS * n * HEAD_DIM * 4
        held = cost.kept_bytes - 3 * tensor + (tensor if family == "sparse" else 0)  # the others keep the very output that they return
        recording = max(cost.forward_bytes, held)
    return {"forward": cost.forward_bytes, "recording": recording, "both": cost.training_bytes}


def rows(name: str, is_causal: bool, lengths: tuple[int, ...], device: torch.device) -> list[dict[str, object]]:
    """One for each length."""
    found = []
    for n in lengths:
        attention = attnzoo.build(name, heads=HEADS, head_dim=HEAD_DIM, **sized(name, n)).to(device)
        row: dict[str, object] = {"variant": name, "is_causal": is_causal, "length": n}
        for kind, formula in formulas(attention.cost(1, n, is_causal=is_causal), n, spec_of(name).family).items():
            peak = measured(attention, n, is_causal, kind, device)
            row |= {f"{kind}_peak": peak, f"{kind}_formula": formula, f"{kind}_ratio": None if formula is None else round(peak / formula, 4)}
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Allocator peaks against the closed forms.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/memory_formula.jsonl"))
    parser.add_argument("--lengths", type=int, nargs="+", default=None)
    parser.add_argument("--variants", nargs="+", default=None)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device)
    where = environment(seed=0, device=device, dtype=torch.float32)
    torch.manual_seed(0)
    print(f"{'variant':16}{'form':15}{'length':>8}" + "".join(f"{kind + ', MiB':>16}{'ratio':>8}" for kind in KINDS))
    with arguments.output.open("w") as file:
        for name in arguments.variants or attnzoo.names():
            spec = spec_of(name)
            lengths = tuple(arguments.lengths or (QUADRATIC_LENGTHS if "n²" in spec.complexity else LENGTHS))
            for is_causal in spec.forms:
                for row in rows(name, is_causal, lengths, device):
                    file.write(json.dumps({**row, "environment": where}) + "\n")
                    file.flush()
                    cells = "".join(f"{row[f'{kind}_peak'] / 2**20:>16,.1f}{row[f'{kind}_ratio'] or '–':>8}" for kind in KINDS)  # type: ignore[operator]
                    print(f"{name:16}{'causal' if is_causal else 'bidirectional':15}{row['length']:>8,}{cells}", flush=True)


if __name__ == "__main__":
    main()
