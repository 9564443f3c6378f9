"""Ask counters of operations about the same attentions.

    sh benchmarks/counters/setup.sh FOLDER
    PYTHONPATH=FOLDER python benchmarks/counters/count.py [--output FILE]
    python -m benchmarks.readme.update

Every question has a process of its own, since some counters put hooks into torch and leave them
there after an error. A row of the result file is one counter asked about one attention: its number
as it stands, its unit, and the MACs that the products of the attention take. The tables are in
docs/guides/counting.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import attnzoo

RESULTS = Path(__file__).parents[1] / "results/counters.jsonl"
LENGTH, WIDTH, HEADS = 256, 128, 4
HEAD_DIM, INNER, LAYERS = WIDTH // HEADS, 4 * WIDTH, 2
#: Two products of every query with every key, and four projections of every token.
CORE, PROJECTIONS = 2 * LENGTH**2 * WIDTH, 4 * LENGTH * WIDTH**2


@dataclass(frozen=True)
class Counted:
    """A module that takes one tensor.

    name: in the table
    make: gives it and its input
    macs: of its products
    learns: whether gradients are on
    """

    name: str
    make: Callable[[], tuple[nn.Module, Tensor]]
    macs: Callable[[], int]
    learns: bool = True


@dataclass(frozen=True)
class Counter:
    """A counter.

    package: that has it
    unit: of its number, "MACs" or "FLOPs"
    count: its number of one call
    """

    package: str
    unit: str
    count: Callable[[nn.Module, Tensor], float]


class Torch(nn.Module):
    """nn.MultiheadAttention on itself."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=self.need_weights)[0]


class Exact(nn.Module):
    """scaled_dot_product_attention of x with itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class Zoo(nn.Module):
    """This library's layer on itself, causal where its variant must be."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.is_causal = not attnzoo.describe(name).spec.bidirectional
        self.layer = attnzoo.MultiheadAttention(
            WIDTH, HEADS, batch_first=True, attention=name, attention_options=options
        )
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        self.register_buffer("mask", mask if self.is_causal else None)

    def forward(self, x: Tensor) -> Tensor:
        masks = {"attn_mask": self.mask, "is_causal": True} if self.is_causal else {}
        return self.layer(x, x, x, need_weights=False, **masks)[0]

    @property
    def macs(self) -> int:
        """Of the closed form, and of a linear map of every token for each matrix."""
        cost = self.layer.attention.cost(1, LENGTH, is_causal=self.is_causal)
        matrices = [one for name, one in self.named_parameters() if one.dim() == 2]
        return cost.macs + LENGTH * sum(one.numel() for one in matrices)


class Bert(nn.Module):
    """A small BERT of transformers."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        config = transformers.BertConfig(
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            num_hidden_layers=LAYERS,
            intermediate_size=INNER,
            vocab_size=100,
        )
        config._attn_implementation = attention
        self.model = transformers.BertModel(config, add_pooling_layer=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).last_hidden_state


def zoo(name: str, **options: Any) -> Counted:
    """A variant in this library's layer."""
    return Counted(
        f"`attnzoo.MultiheadAttention`, `{name}`",
        lambda: (Zoo(name, **options).eval(), sequence()),
        lambda: Zoo(name, **options).macs,
    )


def sequence(*shape: int) -> Tensor:
    return torch.randn(*(shape or (1, LENGTH, WIDTH)))


def tokens() -> Tensor:
    return torch.randint(100, (1, LENGTH))


BERT = LAYERS * (CORE + PROJECTIONS + 2 * LENGTH * WIDTH * INNER)
COUNTED = (
    Counted(
        "`nn.MultiheadAttention`",
        lambda: (Torch(False).eval(), sequence()),
        lambda: CORE + PROJECTIONS,
    ),
    Counted(
        "the same with weights",
        lambda: (Torch(True).eval(), sequence()),
        lambda: CORE + PROJECTIONS,
    ),
    Counted(
        "the same without gradients",
        lambda: (Torch(False).eval(), sequence()),
        lambda: CORE + PROJECTIONS,
        learns=False,
    ),
    Counted(
        "SDPA, (batch, heads, length, width)",
        lambda: (Exact(), sequence(1, HEADS, LENGTH, HEAD_DIM)),
        lambda: CORE,
    ),
    Counted(
        "SDPA, (batch, length, width)",
        lambda: (Exact(), sequence(HEADS, LENGTH, HEAD_DIM)),
        lambda: CORE,
    ),
    zoo("standard"),
    zoo("linear"),
    zoo("sliding_window", window=32),
    zoo("bigbird", block_size=16),
    zoo("gated_deltanet"),
    Counted("BERT, SDPA", lambda: (Bert("sdpa").eval(), tokens()), lambda: BERT),
    Counted("BERT, eager", lambda: (Bert("eager").eval(), tokens()), lambda: BERT),
)


def of(path: str) -> Any:
    """What MODULE:NAME names."""
    module, name = path.split(":")
    return getattr(import_module(module), name)


def of_fvcore(module: nn.Module, x: Tensor) -> float:
    from fvcore.nn import FlopCountAnalysis

    logging.getLogger("fvcore").setLevel(logging.ERROR)
    return FlopCountAnalysis(module, x).total()


def of_torch(module: nn.Module, x: Tensor) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops()


def of_lightning(module: nn.Module, x: Tensor) -> float:
    return of("lightning_fabric.utilities.throughput:measure_flops")(module, lambda: module(x))


def of_thop(module: nn.Module, x: Tensor) -> float:
    return of("thop:profile")(module, inputs=(x,), verbose=False)[0]


def of_ptflops(backend: str) -> Callable[[nn.Module, Tensor], float]:
    def count(module: nn.Module, x: Tensor) -> float:
        name = "ids" if isinstance(module, Bert) else "x"
        return of("ptflops:get_model_complexity_info")(
            module,
            (1,),
            as_strings=False,
            print_per_layer_stat=False,
            backend=backend,
            input_constructor=lambda _: {name: x},
        )[0]

    return count


def of_calflops(module: nn.Module, x: Tensor) -> float:
    told = {"output_as_string": False, "print_results": False, "print_detailed": False}
    return of("calflops:calculate_flops")(module, args=[x], **told)[1]


def of_torchinfo(module: nn.Module, x: Tensor) -> float:
    return of("torchinfo:summary")(module, input_data=x, verbose=0).total_mult_adds


def of_torchprofile(module: nn.Module, x: Tensor) -> float:
    return of("torchprofile:profile_macs")(module, x)


def taught(
    count: Callable[[nn.Module, Tensor], float],
) -> Callable[[nn.Module, Tensor], float]:
    """After `register_flop_counters`."""

    def afterwards(module: nn.Module, x: Tensor) -> float:
        with attnzoo.register_flop_counters():
            return count(module, x)

    return afterwards


COUNTERS = {
    "attnzoo.count_flops": Counter(
        "attnzoo", "MACs", lambda module, x: attnzoo.count_flops(module, x).macs
    ),
    "fvcore": Counter("fvcore", "MACs", of_fvcore),
    "fvcore, taught": Counter("fvcore", "MACs", taught(of_fvcore)),
    "torch FlopCounterMode": Counter("torch", "FLOPs", of_torch),
    "torch FlopCounterMode, taught": Counter("torch", "FLOPs", taught(of_torch)),
    "Lightning measure_flops": Counter("lightning-fabric", "FLOPs", of_lightning),
    "torchprofile": Counter("torchprofile", "MACs", of_torchprofile),
    "thop": Counter("thop", "MACs", of_thop),
    "ptflops, pytorch": Counter("ptflops", "MACs", of_ptflops("pytorch")),
    "ptflops, aten": Counter("ptflops", "MACs", of_ptflops("aten")),
    "calflops": Counter("calflops", "MACs", of_calflops),
    "torchinfo": Counter("torchinfo", "MACs", of_torchinfo),
}


def asked(pair: tuple[str, int]) -> dict[str, Any]:
    """The row of a counter asked about the attention at a place of COUNTED."""
    name, place = pair
    counter, one = COUNTERS[name], COUNTED[place]
    torch.manual_seed(0)
    module, x = one.make()
    row: dict[str, Any] = {"counter": name, "package": counter.package, "unit": counter.unit}
    row |= {"version": version(counter.package).split("+")[0], "attention": one.name}
    row |= {"date": str(date.today()), "macs": one.macs()}
    try:
        with (
            torch.set_grad_enabled(one.learns),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            row["says"] = counter.count(module, x)
    except Exception as error:  # whatever a counter raises is its answer
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="What counters say of the same attentions.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    output = parser.parse_args().output
    pairs = [(name, place) for name in COUNTERS for place in range(len(COUNTED))]
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool, output.open("w") as file:
        for row in pool.imap(asked, pairs, chunksize=1):
            file.write(json.dumps(row) + "\n")
            print(row["counter"], row["attention"], row.get("says", row.get("error")), flush=True)


if __name__ == "__main__":
    main()
