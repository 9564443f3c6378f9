"""Short inputs, on which sparse attention has little to save: every variant against the faster of
torch's SDPA and its SDPA under a dense mask; 12 heads of 64, float32, CPU.

    OMP_PROC_BIND=true python -m benchmarks.short_inputs [--output FILE] [--rounds N] [VARIANT ...]

A contender and both of SDPA's calls take turns; a ratio is the median over the rounds of one
round's ratio, with its quartiles: 1.1 is 10% more time than exact attention takes. SDPA's mask is
causality, padding or both, made before the clock starts. A padded call hides the last eighth of
every second sample. Rows are compared with the reference in the same run. What is compiled is
taken; TORCH_EXTENSIONS_DIR with the name of an empty folder measures without it.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import attnzoo
from attnzoo.attention import Attention
from attnzoo.benchmarking.environment import environment
from attnzoo.benchmarking.timing import disagreement, interleave
from benchmarks.selected import passes, quotients

HEADS, HEAD_DIM, ROUNDS, BUDGET = 12, 64, 7, 1.5
SPARSE: dict[str, dict[str, Any]] = {
    "sliding_window": {"window": 128},
    "sliding_window, sinks": {"window": 128, "sinks": 4},
    "sliding_window, dilated": {"window": 128, "dilation": 2},
    "bigbird": {"block_size": 32},
    "longformer": {"window": 128},
    "sparse_transformer": {},
    "moba": {"block_size": 64, "top_k": 3},
}
KERNELS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosformer": {"max_length": 2048},
    "retention": {},
    "performer": {},
    "mamba2": {},
    "gla": {},
    "gated_deltanet": {},
    "reformer": {},
}
#: By kind and batch size.
LENGTHS = {
    "sparse": {1: (32, 64, 128, 256, 512, 1024, 2048), 8: (32, 128, 512)},
    "kernels": {1: (128, 512), 8: (128, 512)},
}


class Setting(NamedTuple):
    """Sizes of a call, and what it hides."""

    batch_size: int
    length: int
    is_causal: bool
    is_padded: bool

    def key_mask(self) -> Tensor | None:
        """(batch, length) bool: real slots."""
        if not self.is_padded:
            return None
        mask = torch.ones(self.batch_size, self.length, dtype=torch.bool)
        mask[::2, self.length - self.length // 8 :] = False
        return mask

    def dense_mask(self) -> Tensor:
        """What SDPA is to hide, as one mask."""
        mask = torch.ones(self.length, self.length, dtype=torch.bool)
        mask = mask.tril() if self.is_causal else mask
        key_mask = self.key_mask()
        return mask if key_mask is None else mask & key_mask[:, None, None]


def settings(lengths: dict[int, tuple[int, ...]]) -> Iterator[Setting]:
    for batch_size, of_batch in lengths.items():
        for sizes in itertools.product(of_batch, (False, True), (False, True)):
            yield Setting(batch_size, *sizes)


def gates(attention: Attention, setting: Setting) -> dict[str, Tensor]:
    """Inputs that the variant requires: half-open gates and write strengths."""
    shape = (setting.batch_size, HEADS, setting.length)
    found: dict[str, Tensor] = {}
    for one in attention.spec.inputs:
        if one.required and one.name == "beta":
            found["beta"] = torch.rand(shape)
        elif one.required:
            width = (HEAD_DIM,) if one.axes.endswith("width") else ()
            found[one.name] = F.logsigmoid(torch.randn(*shape, *width) + 3)
    return found


def mistake(
    attention: Attention, inputs: list[Tensor], call: dict[str, Any], out: Tensor
) -> str | None:
    """What is wrong with rows that a backend gave, beside the reference."""
    backend, attention.backend = attention.backend, "reference"
    with torch.no_grad():
        wanted = attention(*inputs, **call)
    attention.backend = backend
    return disagreement(out.detach(), wanted)


def rows(
    label: str, options: dict[str, Any], setting: Setting, rounds: int
) -> Iterator[dict[str, Any]]:
    """One for each phase."""
    name = label.split(",")[0]
    attention = attnzoo.build(name, heads=HEADS, head_dim=HEAD_DIM, **options)
    shape = (setting.batch_size, HEADS, setting.length, HEAD_DIM)
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    mask = setting.dense_mask()
    call: dict[str, Any] = {
        "is_causal": setting.is_causal,
        "key_mask": setting.key_mask(),
        **gates(attention, setting),
    }

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, **call)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=setting.is_causal)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    wrong = mistake(attention, inputs, call, attend(*inputs))
    for learns in (False, True):
        who: dict[str, Callable[..., Tensor]] = {
            "exact": exact,
            "masked": masked,
            "variant": attend,
        }
        timings = interleave(
            {key: passes(function, inputs, learns) for key, function in who.items()},
            rounds=rounds if setting.length >= 512 else 5 * rounds,
            warmups=1 if setting.length >= 512 else 5,
            budget=BUDGET,
        )
        faster = min("exact", "masked", key=lambda key: timings[key].median)
        yield {
            "variant": label,
            "options": options,
            **setting._asdict(),
            "phase": "forward+backward" if learns else "forward",
            "backend": attention.last_backend,
            "mistake": wrong,
            "seconds": {key: timing.median for key, timing in timings.items()},
            "over_exact": quotients(timings["variant"], timings["exact"]),
            "over_faster": quotients(timings["variant"], timings[faster]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="*", help="labels, as printed; all by default")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/short_inputs.jsonl")
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--lengths", type=int, nargs="+", help="others than those recorded")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="with --lengths")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    where = environment(seed=0, device=torch.device("cpu"), dtype=torch.float32)
    with arguments.output.open("w") as file:
        for kind, contenders in (("sparse", SPARSE), ("kernels", KERNELS)):
            lengths = LENGTHS[kind]
            if arguments.lengths:
                lengths = dict.fromkeys(arguments.batches, tuple(arguments.lengths))
            for label, options in contenders.items():
                if arguments.variants and label not in arguments.variants:
                    continue
                spec = attnzoo.build(
                    label.split(",")[0], heads=HEADS, head_dim=HEAD_DIM, **options
                ).spec
                for setting in settings(lengths):
                    if not spec.runs(setting.is_causal):
                        continue
                    for row in rows(label, options, setting, arguments.rounds):
                        file.write(json.dumps({**row, "environment": where}) + "\n")
                        file.flush()
                        print(line(row), flush=True)


def line(row: dict[str, Any]) -> str:
    said = " ".join(
        f"{row[key][0]:6.2f} ({row[key][1][0]:.2f}-{row[key][1][1]:.2f})"
        for key in ("over_exact", "over_faster")
    )
    flags = ("causal " if row["is_causal"] else "       ") + (
        "padded" if row["is_padded"] else "      "
    )
    return (
        f"{row['variant']:24} {row['batch_size']} x {row['length']:5} {flags} {row['phase'][-8:]:9}"
        f" {row['backend']:9} {said}  {row['mistake'] or 'right'}"
    )


if __name__ == "__main__":
    main()
