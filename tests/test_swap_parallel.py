"""A swapped encoder on two processes says what it says on one: data parallel, sharded, and split by
heads; outputs and gradients.

In float64: products of other shapes round otherwise, and Nyström's inverse makes that larger, by
how much depends on the processor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import PROCESSES, in_two_processes
from small import layer_masks, small
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import attnzoo

#: Every variant, and what it may have per head or share between layers.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, small(name)) for name in attnzoo.names() if name != "linformer"},
    **{
        f"linformer, {sharing}": ("linformer", {**small("linformer"), "sharing": sharing})
        for sharing in ("none", "headwise", "layerwise")
    },
}
BATCH, LENGTH, SIZE, HEADS = 4, 20, 16, 4
TOLERANCE = 1e-12


def encoder(case: str) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(SIZE, HEADS, 24, 0.0, batch_first=True), 2
    )
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("in_proj_weight"):
                parameter.mul_(3)  # scores that tell keys apart
    name, options = CASES[case]
    return attnzoo.swap(model, name, **options).double()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, padding (True = ignore), and what to weigh the outputs with; padded rows count for
    nothing."""
    generator = torch.Generator().manual_seed(1)
    x, upstream = (
        torch.randn(BATCH, LENGTH, SIZE, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    padding = torch.arange(LENGTH) >= torch.tensor([20, 13, 7, 16])[:, None]
    return x, padding, upstream.masked_fill(padding[..., None], 0.0)


def stack_masks(case: str) -> dict[str, Any]:
    """What a stack of layers is called with beside tokens and padding."""
    found = layer_masks(attnzoo.describe(CASES[case][0]).spec, LENGTH)
    return {"mask": found["src_mask"], "is_causal": True} if found else {}


def differs(what: str, actual: Tensor, wanted: Tensor) -> list[str]:
    error = float((actual - wanted).detach().abs().max()) / max(
        float(wanted.detach().abs().max()), 0.1
    )
    return [f"{what}: {error:.1e} off"] if not error < TOLERANCE else []


def run(case: str, model: Any, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """The output and the gradient of the input, for some of the rows; parameters keep their
    gradients."""
    x, padding, upstream = (tensor[rows] for tensor in inputs())
    x = x.clone().requires_grad_()
    out = model(x, src_key_padding_mask=padding, **stack_masks(case))
    (out * upstream).sum().backward()
    assert x.grad is not None
    return out.detach().masked_fill(padding[..., None], 0.0), x.grad


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name, whole even where a process holds a part."""
    found = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {
        name: gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        for name, gradient in found.items()
    }


def own_rows() -> slice:
    share = BATCH // PROCESSES
    return slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)


def data_parallel(case: str) -> list[str]:
    model = encoder(case)
    return _half_each(case, model, nn.parallel.DistributedDataParallel(copy.deepcopy(model)))


def fully_sharded(case: str) -> list[str]:
    from torch.distributed.fsdp import fully_shard

    model = encoder(case)
    sharded: Any = copy.deepcopy(model)
    if "layerwise" not in case:  # layers that share a parameter are one unit
        for layer in sharded.layers:
            fully_shard(layer)
    return _half_each(case, model, fully_shard(sharded))


def _half_each(case: str, model: nn.Module, parallel: nn.Module) -> list[str]:
    """Each process has half of the batch; gradients come back as the mean over processes."""
    (out, of_input), (own, own_of_input) = run(case, model), run(case, parallel, own_rows())
    wanted, found = gradients(model), gradients(parallel)
    wrong = differs("output", own, out[own_rows()]) + differs(
        "gradient of the input", own_of_input, of_input[own_rows()]
    )
    for name, gradient in wanted.items():
        wrong += differs(
            f"gradient of {name}",
            found[name if name in found else f"module.{name}"] * PROCESSES,
            gradient,
        )
    return (
        wrong
        if len(found) == len(wanted)
        else [*wrong, f"{len(found)} gradients for {len(wanted)}"]
    )


def split_by_heads(case: str) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    from attnzoo.integrations.tensor_parallel import tensor_parallel_plan

    model, split = encoder(case), encoder(case)
    plan = {
        **tensor_parallel_plan(split),
        "layers.*.linear1": ColwiseParallel(),
        "layers.*.linear2": RowwiseParallel(),
    }
    parallelize_module(split, init_device_mesh("cpu", (PROCESSES,)), plan)
    (out, of_input), (own, own_of_input) = run(case, model), run(case, split)
    wrong = differs("output", own, out) + differs("gradient of the input", own_of_input, of_input)
    wanted, found = gradients(model), gradients(split)
    for name in wanted:
        layer, _, last = name.rpartition("in_proj_")
        if not layer and "global_projection." in name:
            layer, _, last = name.rpartition(".")
            parts = torch.cat([found.pop(f"{layer}.{part}.{last}") for part in "qkv"])
        else:
            parts = (
                torch.cat([found.pop(f"{layer}projections.{part}.{last}") for part in "qkv"])
                if layer
                else found.pop(name)
            )
        if parts.shape != wanted[name].shape:  # a core's own heads, in a plain tensor
            parts = torch.cat(_gathered(parts))
        wrong += differs(f"gradient of {name}", parts, wanted[name])
    heads = {core.heads for core in split.modules() if isinstance(core, attnzoo.Attention)}
    return (
        wrong
        + [f"{name} has a gradient of its own" for name in found]
        + ([] if heads == {HEADS // PROCESSES} else [f"{heads} heads"])
    )


def _gathered(part: Tensor) -> list[Tensor]:
    parts = [
        torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(PROCESSES)
    ]
    dist.all_gather(parts, part.contiguous())
    return parts


WAYS: list[Callable[[str], list[str]]] = [data_parallel, fully_sharded, split_by_heads]


def refusals() -> list[str]:
    """What cannot be split by heads says so, in sentences."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from attnzoo.integrations.tensor_parallel import HeadParallel, tensor_parallel_plan

    mesh, x = init_device_mesh("cpu", (PROCESSES,)), torch.randn(1, 4, 6)
    module = attnzoo.MultiheadAttention(6, 2, batch_first=True)
    parallelize_module(module, mesh, HeadParallel())
    split = encoder("standard")
    parallelize_module(split, mesh, tensor_parallel_plan(split))
    attempts: dict[str, Callable[[], Any]] = {
        "need_weights=True: this process has the weights of its own heads only": lambda: module(
            x, x, x
        ),
        "standard has 3 heads, which 2 processes cannot share": lambda: parallelize_module(
            attnzoo.MultiheadAttention(6, 3), mesh, HeadParallel()
        ),
        "belong to no process's heads": lambda: parallelize_module(
            attnzoo.MultiheadAttention(6, 2, add_zero_attn=True), mesh, HeadParallel()
        ),
        "divides by a mean over all heads": lambda: parallelize_module(
            attnzoo.MultiheadAttention(6, 2, qk_norm="all_heads"), mesh, HeadParallel()
        ),
        "short_convolution and gate_proj cannot be split by heads": lambda: parallelize_module(
            attnzoo.MultiheadAttention(6, 2, short_convolution=4, output_gate="headwise"),
            mesh,
            HeadParallel(),
        ),
        "not Linear; swap the model first": lambda: parallelize_module(
            nn.Linear(2, 2), mesh, HeadParallel()
        ),
        "layers.0.self_attn has its in_proj_weight split over processes": lambda: attnzoo.unswap(
            split
        ),
        "is not swapped": lambda: tensor_parallel_plan(nn.Linear(2, 2)),
    }
    wrong = []
    for sentence, attempt in attempts.items():
        try:
            attempt()
            wrong.append(f"not refused: {sentence}")
        except ValueError as error:
            wrong += [] if sentence in str(error) else [f"{error} instead of {sentence}"]
    return wrong


def normalised_and_turned() -> list[str]:
    """The norm that all heads share gets the sum of their gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from attnzoo.integrations.tensor_parallel import HeadParallel

    torch.manual_seed(0)
    layer = attnzoo.MultiheadAttention(
        SIZE, HEADS, batch_first=True, qk_norm="per_head", rotary=True
    ).double()
    split = copy.deepcopy(layer)
    parallelize_module(split, init_device_mesh("cpu", (PROCESSES,)), HeadParallel())
    x, padding, upstream = inputs()
    found = []
    for one in (layer, split):
        out = one(x, x, x, padding, need_weights=False)[0]
        (out * upstream).sum().backward()
        found.append(out.detach())
    wrong = differs("output", found[1], found[0])
    own = gradients(split)
    for name in ("q_norm.weight", "k_norm.weight"):
        wrong += differs(f"gradient of {name}", own[name], gradients(layer)[name])
    return wrong


def every_way() -> list[str]:
    return (
        [f"{way.__name__}, {case}: {line}" for way in WAYS for case in CASES for line in way(case)]
        + normalised_and_turned()
        + refusals()
    )


@pytest.mark.thorough
def test_two_processes_say_what_one_says() -> None:
    assert in_two_processes(every_way) == []


def transformers_by_heads() -> list[str]:
    """BERT, and Llama with two query heads for one of keys and values."""
    from swap_models import answer_of, make
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    from attnzoo.integrations.tensor_parallel import tensor_parallel_plan

    projections = {
        "bert": (
            ("attention.self.query", "attention.self.key", "attention.self.value"),
            "attention.output.dense",
            "encoder.layer.*.",
        ),
        "llama": (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "self_attn.o_proj",
            "model.layers.*.",
        ),
    }
    wrong = []
    for family, (inward, outward, layers) in projections.items():
        for case in ("standard", "performer", "bigbird", "linformer, none")[
            : 4 if family == "bert" else 3
        ]:
            name, options = CASES[case]
            model, split = (attnzoo.swap(make(family), name, **options) for _ in range(2))
            own = {
                **{f"{layers}{path}": ColwiseParallel() for path in inward},
                f"{layers}{outward}": RowwiseParallel(),
            }
            parallelize_module(
                split, init_device_mesh("cpu", (PROCESSES,)), {**tensor_parallel_plan(split), **own}
            )
            wanted, found = answer_of(family, model), answer_of(family, split)
            upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(5))
            for out in (wanted, found):
                (out * upstream).sum().backward()
            lines = differs("output", found, wanted)
            for path, gradient in gradients(split).items():
                whole = gradients(model)[path]
                lines += differs(
                    f"gradient of {path}",
                    torch.cat(_gathered(gradient)) if gradient.shape != whole.shape else gradient,
                    whole,
                )
            wrong += [f"{family}, {case}: {line}" for line in lines]
    return wrong


@pytest.mark.slow
def test_heads_of_transformers_models_on_two_processes() -> None:
    pytest.importorskip("transformers")
    assert in_two_processes(transformers_by_heads) == []
