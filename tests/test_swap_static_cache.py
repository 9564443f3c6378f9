"""Generation of a swapped model with a static cache: the tokens of one without a cache, and one
graph where it is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from small import of_each_engine, small
from stages import only
from swap_models import make, padded, tokens
from transformers import CompileConfig

import attnzoo

SPECS = {name: attnzoo.describe(name).spec for name in of_each_engine()}
CAUSAL = [name for name, spec in SPECS.items() if spec.causal and not spec.has_gates]
NEW = 8
SETTINGS: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def compiled() -> CompileConfig:
    """Without a change of shape and without a break; transformers compiles on a CPU when it is told
    so."""
    config: Any = CompileConfig(fullgraph=True, dynamic=False, backend="eager")
    config._compile_all_devices = True
    return config


def graphs(model: Any, ids: torch.Tensor, **settings: Any) -> tuple[torch.Tensor, int]:
    """What a compiled model generates with a static cache, and how many graphs it takes."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    out = model.generate(ids, cache_implementation="static", compile_config=compiled(), **settings)
    return out, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", only(["standard", "cosformer"], CAUSAL))
def test_a_static_cache(name: str) -> None:
    """Left-padded: compiled, the slots that are not filled yet are such padding too."""
    model = attnzoo.swap(make("llama", num_hidden_layers=1), name, **small(name))
    ids, settings = tokens(9), {"attention_mask": padded("left", 9), **SETTINGS}
    wanted = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, cache_implementation="static", **settings), wanted)
    out, count = graphs(model, ids, **settings)
    assert torch.equal(out, wanted) and count == 1


MIXED = ("bart", {3: ("sliding_window", {"window": 3})})


@pytest.mark.thorough
@pytest.mark.parametrize(("family", "mix"), only([MIXED], [("t5_whole", "standard"), MIXED]))
def test_a_static_cache_of_an_encoder_decoder(family: str, mix: Any) -> None:
    """With T5's bias of positions, and beside a decoder layer that was not swapped."""
    model = attnzoo.swap(make(family), mix)
    ids, settings = tokens(9), {"attention_mask": padded("left", 9), **SETTINGS}
    wanted = model.generate(ids, use_cache=False, **settings)
    out, count = graphs(model, ids, **settings)
    assert torch.equal(out, wanted) and count == 1
