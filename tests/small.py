"""Any registered variant, built and called as its spec says: what a test over the whole zoo asks
instead of assuming.

A new variant whose defaults see a whole short input gets its line in `SMALL`, and nothing else
here.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

import attnzoo
from attnzoo import Attention, Spec
from attnzoo.engines.engine import Engine
from attnzoo.engines.linear.gated.gated_linear import GatedLinear
from attnzoo.registry import sized

#: Forms that leave something out of twenty tokens, so that a window, blocks, draws and landmarks
#: matter there.
SMALL: dict[str, dict[str, Any]] = {
    "bigbird": {
        "block_size": 2,
        "num_window_blocks": 1,
        "num_global_blocks": 1,
        "num_random_blocks": 1,
    },
    "indexed": {"top_k": 4},
    "linformer": {"rank": 4},
    "longformer": {"window": 4, "global_tokens": 1},
    "moba": {"block_size": 2, "top_k": 2},
    "nystromformer": {"num_landmarks": 4},
    "nsa": {"block_size": 2, "top_k": 3, "window_size": 4},
    "performer": {"num_features": 16},
    "reformer": {"num_buckets": 4, "num_hashes": 1, "chunk_size": 4},
    "sliding_window": {"window": 4},
    "sparse_transformer": {"stride": 4},
    "xattention": {"block_size": 2, "stride": 2, "threshold": 0.5},
}


def in_models() -> list[str]:
    """The variants that tests of whole models run over: of those of the engine of gates, which
    differ in what a token does to the state alone, the one that has every kind of their inputs."""
    gated = {name for name in attnzoo.names() if _is_gated(name)}
    return [name for name in attnzoo.names() if name not in gated - {"gated_deltanet"}]


@cache
def of_each_engine() -> list[str]:
    """One variant of each engine and kind of call: what tests run over that take seconds, of what
    stands around an attention and not of the attention."""
    chosen: dict[Any, str] = {}
    for name in in_models():
        chosen.setdefault((type(_engine(name)), attnzoo.describe(name).spec.forms), name)
    return list(chosen.values())


@cache
def of_each_folder() -> list[str]:
    """One variant of each folder of engines: what the first stage runs of tests that take long."""
    chosen: dict[str, str] = {}
    for name in in_models():
        folder = type(_engine(name)).__module__.rpartition(".")[0]
        if folder.startswith("attnzoo.engines."):
            chosen.setdefault(folder, name)
    return list(chosen.values())


@cache
def of_each_family() -> list[str]:
    """One variant of each family, with inputs of its own and without: what the first stage runs
    where the second runs over more."""
    chosen: dict[Any, str] = {}
    for name in in_models():
        spec = attnzoo.describe(name).spec
        chosen.setdefault((spec.family, spec.has_gates), name)
    return list(chosen.values())


def _is_gated(name: str) -> bool:
    return isinstance(_engine(name), GatedLinear)


def _engine(name: str) -> Engine:
    return attnzoo.build(name, heads=1, head_dim=8, **sized(name, 8)).engine


def small(name: str, length: int = 64) -> dict[str, Any]:
    """Options of the variant's small form, for inputs of up to `length` tokens."""
    return {**sized(name, length), **SMALL.get(name, {})}


def build_small(name: str, heads: int, head_dim: int, length: int = 64, **more: Any) -> Attention:
    return attnzoo.build(name, heads=heads, head_dim=head_dim, **{**small(name, length), **more})


def possible(spec: Spec) -> dict[str, Any]:
    """One kind of call that the spec allows: bidirectional where it can be."""
    return {"is_causal": spec.forms[0]}


def layer_masks(spec: Spec, length: int) -> dict[str, Any]:
    """The same for torch's Transformer layers: nothing, or their causal mask (True = hidden)."""
    return {} if spec.bidirectional else {"src_mask": causal_bool(length), "is_causal": True}


def causal_bool(length: int) -> Tensor:
    """torch's dialect: True = hidden."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def cannot(name: str, is_causal: bool) -> str:
    """How the refusal of such a call begins, as a regular expression."""
    return f"{name} cannot be causal" if is_causal else f"{name} is causal only"
