"""Tensor parallelism: each process projects, attends and projects back for its own heads, as in
Megatron-LM (Shoeybi et al. 2019, section 3)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from attnzoo.attention import Attention
from attnzoo.call import UnsupportedError
from attnzoo.engines.linear.gated.gate_projections import Gate
from attnzoo.integrations.swapping import record_of
from attnzoo.layers.input_projections import INPUT_PROJECTIONS
from attnzoo.layers.multihead import MultiheadAttention
from attnzoo.layers.options.output_gate import BONUS, GATE_PROJECTION, OUTPUT_NORM, SKIP
from attnzoo.layers.options.qk_norm import NORMS
from attnzoo.layers.options.short_convolution import SHORT_CONVOLUTION
from attnzoo.layers.options.token_shift import TOKEN_SHIFT

#: What `MultiheadAttention` may have that no process could have for its heads alone.
NOT_SPLIT = (TOKEN_SHIFT, SHORT_CONVOLUTION, GATE_PROJECTION, OUTPUT_NORM, SKIP, BONUS)


class HeadParallel(ParallelStyle):
    """For `parallelize_module`: the heads of an attention of the zoo are split evenly over a mesh
    of one dimension.

    On an `attnzoo.MultiheadAttention`, as `attnzoo.swap` puts it into torch's layers, that is the
    whole plan: its packed projections become linear layers, `projections.q`, `.k` and `.v` (`.qk`
    and `.v` where the core shares queries and keys), split by ColwiseParallel, as are those of the
    core's inputs (`Attention.own_projection`, `attention.input_projections`); `out_proj` is split
    by RowwiseParallel. Inputs and outputs are whole on every process; key_padding_mask, a 2-D
    attn_mask and the core's inputs too. The call must say need_weights=False: a process has the
    weights of its own heads only.

    On an `attnzoo.Attention` (a swapped transformers model has one as `attention_core` in each
    layer) only the core is cut to its heads: give the model's own projections ColwiseParallel and
    RowwiseParallel beside it.

    What a core learns per head (Linformer with sharing="none") is cut as well; what its heads share
    is held by every process, and its gradient is summed over them. Random blocks and directions are
    those of the whole attention.

    Raises ValueError where the heads cannot be split evenly and on other modules, UnsupportedError
    on add_bias_kv, add_zero_attn, qk_norm="all_heads", token_shift, short_convolution, output_gate,
    output_norm, skip and bonus.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, Attention):
            _split_core(module, device_mesh)
        elif isinstance(module, MultiheadAttention):
            _split_module(module, device_mesh)
        else:
            raise ValueError(
                "HeadParallel splits an attnzoo.MultiheadAttention or an attnzoo.Attention, not "
                f"{type(module).__name__}; swap the model first"
            )
        return module


def tensor_parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """The entries of a `parallelize_module` plan that a swap adds: HeadParallel for every swapped
    layer, by path.

    A transformers model needs the styles of its own projections beside it: {**plan,
    "layers.*.q_proj": ColwiseParallel(), ...}. Raises ValueError on a model that is not swapped,
    and on timm's, whose fused qkv no style can split.
    """
    record = record_of(model)
    if record.integration == "timm":
        raise ValueError(
            "timm's fused qkv projection cannot be split by heads; use FSDP or DDP for this model"
        )
    swapped = {id(core) for core in record.attentions.values()}
    places = {path: module for path, module in model.named_modules() if id(module) in swapped}
    return {
        path.removesuffix(".attention")
        if record.integration == "torch_nn"
        else path: HeadParallel()
        for path in places
    }


def _split_core(core: Attention, mesh: DeviceMesh) -> None:
    group, processes = mesh.get_group(), mesh.size()
    if core.heads % processes:
        raise ValueError(
            f"{core.spec.name} has {core.heads} heads, which {processes} processes cannot share "
            "evenly; use a divisor of them"
        )
    whole = list(
        core.parameters()
    )  # kept, since a parameter made meanwhile could take the id of one that is gone
    count = core.heads // processes
    core.keep_heads(mesh.get_local_rank() * count, count)
    shared = [one for one in core.parameters() if any(one is other for other in whole)]
    _sum_gradients(shared, group)


def _sum_gradients(shared: Iterable[nn.Parameter], group: Any) -> None:
    """Let the gradients of what all heads share be sums over the processes."""
    for parameter in shared:
        if not getattr(parameter, "sums_over_heads", False):  # layers may share one too
            parameter.register_hook(lambda gradient: _sum(gradient, group))
            parameter.sums_over_heads = True  # pyright: ignore[reportAttributeAccessIssue]


def _sum(gradient: Tensor, group: Any) -> Tensor:
    total = gradient.clone()
    dist.all_reduce(total, group=group)
    return total


def _split_module(module: MultiheadAttention, mesh: DeviceMesh) -> None:
    if module.bias_k is not None or module.add_zero_attn:
        raise UnsupportedError(
            "add_bias_kv and add_zero_attn belong to no process's heads; build the module without "
            "them"
        )
    if module.qk_norm == "all_heads":
        raise UnsupportedError(
            "qk_norm='all_heads' divides by a mean over all heads, which no process's heads have "
            "alone; use qk_norm='per_head', or FSDP or DDP for this model"
        )
    options = [name for name in NOT_SPLIT if name in module._modules]
    if options:
        raise UnsupportedError(
            f"{' and '.join(options)} cannot be split by heads; build the module without "
            "token_shift, short_convolution, output_gate, output_norm, skip and bonus, or use FSDP "
            "or DDP for this model"
        )
    core = module.attention
    names = core.projected
    shared = [
        one.name
        for one in core.spec.inputs
        if one.is_projected_by(core.input_sizes) and not one.has_heads
    ]
    if shared:
        raise UnsupportedError(
            f"{core.spec.name} has {' and '.join(shared)} in common for all heads, whose "
            "projection no process's heads can have alone; use FSDP or DDP for this model"
        )
    # What stays with the core would be cut there, into plain parameters.
    own = getattr(core, core.own_projection) if core.own_projection else None
    if own is not None:
        setattr(core, str(core.own_projection), None)
    projections = core._modules.pop(INPUT_PROJECTIONS, None)
    _split_core(core, mesh)
    if isinstance(own, nn.Linear):
        made = _linears(names, own.weight.detach().chunk(len(names)), own.bias)
        setattr(core, str(core.own_projection), made)
        parallelize_module(made, mesh, {"*": ColwiseParallel()})
    if projections is not None:
        setattr(core, INPUT_PROJECTIONS, projections)
        _split_gates(projections, core, mesh)
    packed = module.in_proj_weight
    weights = (
        (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        if packed is None
        else packed.detach().chunk(len(names))
    )
    module.projections = _linears(names, weights, module.in_proj_bias)
    for name in (
        "in_proj_weight",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "in_proj_bias",
    ):
        module.register_parameter(name, None)
    module.num_heads = module.attention.heads
    for name in NORMS:
        if name in module._modules:
            _sum_gradients(module.get_submodule(name).parameters(), mesh.get_group())
    parallelize_module(module.projections, mesh, {"*": ColwiseParallel()})
    parallelize_module(module.out_proj, mesh, RowwiseParallel())
    module.register_forward_pre_hook(_refuse_weights, with_kwargs=True)
    first = mesh.get_local_rank() * core.heads
    heads = slice(first, first + core.heads)
    module.register_forward_pre_hook(partial(_own_inputs, heads=heads), with_kwargs=True)


def _split_gates(projections: nn.Module, core: Attention, mesh: DeviceMesh) -> None:
    """Split what makes the inputs of a core that is split already."""
    first = mesh.get_local_rank() * core.heads
    for made in projections.children():
        if isinstance(made, Gate):
            made.keep_heads(first, core.heads, mesh.size() * core.heads)
        linear = getattr(made, "out", None) if isinstance(made, Gate) else made
        if linear is not None:
            parallelize_module(linear, mesh, ColwiseParallel())


def _linears(names: Sequence[str], weights: Sequence[Tensor], bias: Tensor | None) -> nn.ModuleDict:
    """A linear layer for each name. bias: packed."""
    biases = (None,) * len(names) if bias is None else bias.detach().chunk(len(names))
    made = nn.ModuleDict()
    for name, weight, part in zip(names, weights, biases, strict=True):
        made[name] = linear = nn.Linear(
            weight.shape[1], weight.shape[0], part is not None, device="meta"
        )
        linear.weight = nn.Parameter(weight.detach().clone())
        if part is not None:
            linear.bias = nn.Parameter(part.clone())
    return made


def _own_inputs(
    module: MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], *, heads: slice
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the inputs of this process's heads alone."""
    for one in module.attention.spec.inputs:
        x = kwargs.get(one.name)
        if x is not None and one.has_heads:
            names = one.names[len(one.names) - x.dim() :]  # without the batch of a call of 2-D
            dim = next(i for i, axis in enumerate(names) if axis in ("heads", "kv_heads"))
            kwargs = {**kwargs, one.name: x.narrow(dim, heads.start, heads.stop - heads.start)}
    return args, kwargs


def _refuse_weights(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = inspect.signature(MultiheadAttention.forward).bind(module, *args, **kwargs)
    if given.arguments.get("need_weights", True):
        raise UnsupportedError(
            "need_weights=True: this process has the weights of its own heads only; pass "
            "need_weights=False"
        )
