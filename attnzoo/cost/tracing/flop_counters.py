"""Torch's FlopCounterMode and fvcore taught what they count as nothing or wrongly."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

from attnzoo.cost.tracing.operators import ELEMENTWISE, Handle, attention_macs, products, shape_of

aten = torch.ops.aten
Shape = tuple[int, ...]
#: What torch's counter has a formula for, and the operators that compute the same and have none.
SAME_AS: dict[Any, tuple[Any, ...]] = {
    aten._scaled_dot_product_flash_attention: (aten._scaled_dot_product_flash_attention_for_cpu,),
    aten._scaled_dot_product_flash_attention_backward: (
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
    ),
    aten.addmm: (aten.addmm_,),
    aten.baddbmm: (aten.baddbmm_,),
}


@dataclass(frozen=True)
class FlopCounters:
    """What `register_flop_counters` changed, and the way back; as a context it is left by it.

    changed: the operators that have another count now, by counter: "torch" and, where it is
        installed, "fvcore"
    """

    changed: dict[str, tuple[str, ...]]
    _undo: list[Callable[[], Any]] = field(repr=False)

    def revoke(self) -> None:
        """Put every counter back as it was. A second time changes nothing."""
        global _registered
        while self._undo:
            self._undo.pop()()
        if _registered is self:
            _registered = None

    def __enter__(self) -> FlopCounters:
        return self

    def __exit__(self, *error: object) -> None:
        self.revoke()


_registered: FlopCounters | None = None


def register_flop_counters() -> FlopCounters:
    """Teach other counters this library's operators and scaled_dot_product_attention on a CPU.

    returns: what was changed; `revoke()` takes it back, as leaving it as a context does. A second
        call changes nothing and returns the same.

    torch.utils.flop_counter.FlopCounterMode, whose number is FLOPs, learns the operators that it
    counts as 0: scaled_dot_product_attention on a CPU and its backward, products that are added in
    place, a matrix times a vector, triangular solves, and the fused layers that
    torch.nn.MultiheadAttention and torch.nn.TransformerEncoderLayer run in evaluation. fvcore,
    whose number is MACs, learns the products that it leaves out and einsum in whole numbers.
    Counters that exist already keep what they know.
    """
    global _registered
    if _registered is None:
        undo: list[Callable[[], Any]] = []
        changed = {"torch": _teach_torch(undo), "fvcore": _teach_fvcore(undo)}
        _registered = FlopCounters({name: told for name, told in changed.items() if told}, undo)
    return _registered


def _teach_torch(undo: list[Callable[[], Any]]) -> tuple[str, ...]:
    known = flop_counter.flop_registry
    formulas = {new: known[old] for old, others in SAME_AS.items() for new in others}
    formulas |= {
        operator: _in_flops(macs)  # torch's counter takes FLOPs
        for operator, macs in {
            aten.mv: lambda matrix, x, **_: prod(matrix.shape),
            aten.addmv: lambda x, matrix, *_, **__: prod(matrix.shape),
            aten.addmv_: lambda x, matrix, *_, **__: prod(matrix.shape),
            aten.linalg_solve_triangular: _solve_macs,
            aten._native_multi_head_attention: _layer_macs,
            aten._transformer_encoder_layer_fwd: _encoder_layer_macs,
        }.items()
    }
    told = {operator: one for operator, one in formulas.items() if operator not in known}
    known.update(told)
    undo.extend(lambda operator=operator: known.pop(operator, None) for operator in told)
    return tuple(sorted(map(str, told)))


def _teach_fvcore(undo: list[Callable[[], Any]]) -> tuple[str, ...]:
    try:
        import fvcore.nn  # noqa: F401
    except ImportError:
        return ()
    # The package has a function of the module's name.
    known = sys.modules["fvcore.nn.flop_count"]._DEFAULT_SUPPORTED_OPS
    before = dict(known)
    told = {
        **{name: _only_products(handle) for name, handle in products().items()},
        "aten::_native_multi_head_attention": _traced_layer_macs,
    }
    known.update(told)

    def back() -> None:
        known.clear()
        known.update(before)

    undo.append(back)
    return tuple(sorted(told))


def _only_products(handle: Handle) -> Handle:
    """The handle without what it counts apart from products, which fvcore would add up."""

    def count(inputs: list[Any], outputs: list[Any]) -> int | Counter[str]:
        found = handle(inputs, outputs)
        if not isinstance(found, Counter):
            return found
        return Counter({name: n for name, n in found.items() if name not in ELEMENTWISE})

    return count


def _traced_layer_macs(inputs: list[Any], outputs: list[Any]) -> int:
    x, *weights = (tuple(shape_of(inputs[place])) for place in (0, 5, 7))
    return _fused_layer_macs(x, weights)


def _in_flops(macs: Callable[..., int]) -> Callable[..., int]:
    """A formula of tensors, as torch's counter calls it: with the output beside the arguments."""
    return lambda *given, out_val, **options: 2 * macs(*given, out=out_val, **options)


def _solve_macs(a: Tensor, b: Tensor, *, out: Tensor, unitriangular: bool = False, **_: Any) -> int:
    """Every unknown takes a product for each one known before it, and a division."""
    size = a.shape[-1]
    return out.numel() * (size - 1 if unitriangular else size + 1) // 2


def _layer_macs(x: Tensor, *given: Any, **_: Any) -> int:
    return _of_every_sample(x, given[4], given[6])


def _encoder_layer_macs(x: Tensor, *given: Any, **_: Any) -> int:
    return _of_every_sample(x, given[2], given[4], given[13], given[15])


def _of_every_sample(x: Tensor, *weights: Tensor) -> int:
    """MACs of a fused layer on x, (batch, length, width) or nested."""
    shapes = [(1, *one.shape) for one in x.unbind()] if x.is_nested else [tuple(x.shape)]
    return sum(_fused_layer_macs(shape, [weight.shape for weight in weights]) for shape in shapes)


def _fused_layer_macs(shape: Shape, weights: Sequence[Shape]) -> int:
    """Every token meets every number of the weights, and every other token in each head.

    shape: (batch, length, width) of the layer's input
    """
    batch, length, width = shape
    heads = (batch, 1, length, width)
    return batch * length * sum(map(prod, weights)) + attention_macs(heads, heads, heads)
