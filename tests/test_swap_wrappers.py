"""Every entry takes what any of them takes: the model, or a wrapper of it, around it before the
swap or after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from stages import in_turn, staged
from swap_models import answer, make, tokens
from test_swap_modules import Wrapper, encoder, vision
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.optim.swa_utils import AveragedModel

import attnzoo
from attnzoo.integrations import timm, torch_nn
from attnzoo.integrations.healing.imitation import (
    attention_parameters,
    matching_loss,
    projection_parameters,
    recorded_calls,
)
from attnzoo.integrations.healing.trained_model import load_healed, save_healed
from attnzoo.integrations.tensor_parallel import tensor_parallel_plan

pytest.importorskip("accelerate")
from accelerate import Accelerator, infer_auto_device_map

X = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(1))
MODELS: dict[str, Callable[[], Any]] = {
    "transformers": lambda: make("llama"),
    "torch": encoder,
    "timm": vision,
}


class LightningModule(nn.Module):
    """As Lightning's, which is known by the name of its class."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net, self.loss, self.head = model, nn.MSELoss(), nn.Linear(2, 2)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "DDP": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    # A language model takes long.
    "compiled": lambda model: torch.compile(
        model, backend="eager", disable=hasattr(model, "config")
    ),
    "averaged": lambda model: AveragedModel(model, use_buffers=True),
    "checkpointed": checkpoint_wrapper,
    "accelerate": lambda model: Accelerator(cpu=True).prepare(model),
    "Lightning": LightningModule,
    "handing on": Wrapper,
    "Lightning in DDP": lambda model: nn.parallel.DistributedDataParallel(LightningModule(model)),
}


@pytest.fixture(autouse=True)
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def run(model: nn.Module, kind: str) -> Tensor:
    return (
        answer(model, tokens(), attention_mask=torch.ones(2, 24))
        if kind == "transformers"
        else model(X)
    )


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0.0, atol=5e-6)  # compiled, it rounds otherwise


@pytest.mark.parametrize(
    ("kind", "wrapper", "first"),
    [  # every two of the three meet
        staged(
            kind,
            wrapper,
            ("swap", "wrap")[(i + j) % 2],
            first=wrapper != "compiled" or kind == "transformers",
        )
        for i, kind in enumerate(MODELS)
        for j, wrapper in enumerate(WRAPPERS)
    ],
)
def test_every_entry_takes_a_wrapper(kind: str, wrapper: str, first: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    model, wrap, path = MODELS[kind](), WRAPPERS[wrapper], tmp_path / "swap.safetensors"
    exact = run(model, kind)
    if first == "swap":
        whole = wrap(attnzoo.swap(model, "linear"))
    else:
        whole = wrap(model)
        assert attnzoo.swap(whole, "linear") is whole
    swapped = run(whole, kind)
    assert not torch.allclose(swapped, exact, atol=1e-4)
    same(run(attnzoo.swap(MODELS[kind](), "linear"), kind), swapped)
    attnzoo.save(whole, path)
    same(run(attnzoo.load(MODELS[kind](), path), kind), swapped)  # into the model alone
    names = attention_parameters(attnzoo.load(MODELS[kind](), path)).keys()
    assert attention_parameters(whole).keys() == names == projection_parameters(whole).keys()
    with recorded_calls(whole) as calls:
        run(whole, kind) if kind != "transformers" else whole(
            tokens(), attention_mask=torch.ones(2, 24), use_cache=False
        )
    assert [call.layer for call in calls] == list(range(len(calls))) != []
    assert float(matching_loss(whole, calls[0])) < 1e-10
    if kind == "transformers":
        assert isinstance(attnzoo.state_cache(whole).held_bytes(), int)
    if kind != "timm":
        assert len(tensor_parallel_plan(whole)) == len(calls)
    with pytest.raises(ValueError, match=r"is swapped already; call attnzoo\.unswap on it first"):
        attnzoo.swap(whole, "standard")
    save_healed(whole, tmp_path)
    attnzoo.unswap(whole)
    same(run(whole, kind), exact)
    with pytest.raises(ValueError, match=r"is not swapped; call attnzoo\.swap"):
        attnzoo.unswap(whole)
    load_healed(whole, tmp_path)
    same(run(whole, kind), swapped)
    attnzoo.unswap(whole)
    with attnzoo.global_mask(
        attnzoo.swap(whole, "longformer", window=2),
        torch.zeros(2, 24, dtype=torch.bool)[:, : run(whole, kind).shape[1]],
    ):
        run(whole, kind)


@pytest.mark.parametrize(
    ("wrapper", "kind"),
    in_turn(
        ["DDP", "DataParallel", "compiled", "checkpointed", "accelerate", "Lightning"], [*MODELS]
    ),
)
def test_what_a_wrapper_calls_is_counted(kind: str, wrapper: str) -> None:
    model = attnzoo.swap(MODELS[kind](), "linear")
    given: dict[str, Any] = (
        {"attention_mask": torch.ones(2, 24), "use_cache": False} if kind == "transformers" else {}
    )
    inputs = tokens() if kind == "transformers" else X
    wanted = attnzoo.count_flops(model, inputs, **given)
    assert attnzoo.count_flops(WRAPPERS[wrapper](model), inputs, **given).macs == wanted.macs > 0


@pytest.mark.parametrize(
    ("kind", "name"), [("torch", "SwappedAttention"), ("timm", "TimmAttention")]
)
def test_the_names_that_policies_ask_for(kind: str, name: str) -> None:
    """Of accelerate by name, of FSDP by class."""
    model = attnzoo.swap(MODELS[kind](), "linear")
    attentions = [
        (path, module) for path, module in model.named_modules() if type(module).__name__ == name
    ]
    size = sum(parameter.nbytes for parameter in attentions[0][1].parameters())

    def is_split(factor: float, names: list[str]) -> bool:
        places = infer_auto_device_map(
            model,
            max_memory={"cpu": int(factor * size), "disk": 10**9},
            no_split_module_classes=names,
        )
        return any(path.startswith(f"{place}.") for path in places for place, _ in attentions)

    factors = (1.3, 1.5, 2.0)
    assert any(is_split(factor, []) for factor in factors) and not any(
        is_split(factor, [name]) for factor in factors
    )
    module = torch_nn.SwappedAttention if kind == "torch" else timm.TimmAttention
    assert len(attentions) == 2 and all(
        isinstance(attention, module) for _, attention in attentions
    )
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={module})
    assert [
        policy(part, recurse=False, nonwrapped_numel=0) for _, part in model.named_modules()
    ].count(True) == 2


def test_a_part_beside_other_attention_is_named() -> None:
    """Then a wrapper it is not."""
    both = LightningModule(nn.ModuleDict({"text": encoder(), "image": encoder()}))
    attnzoo.swap(both.net.text, "linear")  # pyright: ignore[reportArgumentType]
    for entry in (attnzoo.unswap, attention_parameters):
        with pytest.raises(
            ValueError, match=r"is not swapped, but its part net\.text is; give that one"
        ):
            entry(both)
    pair = LightningModule(nn.ModuleDict({"text": make("bert"), "image": encoder()}))
    with pytest.raises(
        ValueError,
        match=r"holds a transformers model; swap that part alone: "
        r"model.get_submodule\('net\.text'\)",
    ):
        attnzoo.swap(pair, "linear")
