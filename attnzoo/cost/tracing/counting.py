"""Counting the operations of any module by tracing it once, through fvcore."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from attnzoo.call import UnsupportedError
from attnzoo.cost.tracing.convolutions import convolution_macs, convolutions_as_one_operator
from attnzoo.cost.tracing.engine_counts import engines_apart
from attnzoo.cost.tracing.operators import ELEMENTWISE, Handle, all_handles
from attnzoo.eager import only_counted
from attnzoo.integrations.wrappers import called_by
from attnzoo.results.units import count


@dataclass(frozen=True)
class FlopReport:
    """Operations of one forward.

    macs: multiply-accumulates of all products; flops = 2 · macs.
    elementwise: what softmax, exponentials, divisions and normalisations take, apart from the macs
    (3 operations for a softmax's score).
    by_operator, by_module: the macs by operator and by module, "" being the whole.
    elementwise_by_operator, elementwise_by_module: the same of elementwise.

    A submodule whose weights its parent reads without calling it, such as the out_proj of
    torch.nn.MultiheadAttention, is counted at the parent.
    """

    macs: int
    elementwise: int
    by_module: dict[str, int]
    by_operator: dict[str, int]
    elementwise_by_module: dict[str, int]
    elementwise_by_operator: dict[str, int]

    @property
    def flops(self) -> int:
        """One MAC is two FLOPs: a multiplication and an addition."""
        return 2 * self.macs

    def __str__(self) -> str:
        """The sums and their operators; the dictionaries have the modules."""
        kinds = (("MACs", self.macs, self.by_operator),)
        kinds += (("elementwise operations", self.elementwise, self.elementwise_by_operator),)
        lines = []
        for name, total, by_operator in kinds:
            parts = sorted(by_operator.items(), key=lambda item: -item[1])
            told = ", ".join(f"{operator} {count(value)}" for operator, value in parts if value)
            lines.append(f"{count(total)} {name}" + (f": {told}" if told else ""))
        return "\n".join(lines)


def count_flops(module: nn.Module, /, *inputs: Any, **kwargs: Any) -> FlopReport:
    """Count one forward `module(*inputs, **kwargs)`.

    module: any module; of a wrapper that adds nothing (DDP, torch.compile) what it wraps is
    counted.
    Raises UnsupportedError on a module that cannot be traced and on an operator that has no count,
    which it names; ImportError when fvcore is not installed.

    The module runs once, without gradients, under torch.jit.trace; with module and inputs on the
    meta device nothing is computed and no memory is taken. What is counted is what is executed: a
    causal scaled_dot_product_attention counts all its scores, the masked half too, as torch's own
    counter does. What no output depends on is not counted.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"count_flops takes a torch.nn.Module; got {type(module).__name__}: wrap a function in "
            "a module"
        )
    module = called_by(module)
    with engines_apart(module, _count_by_operator) as handle:
        return _report(
            _trace(
                module,
                inputs,
                kwargs,
                **{"prim::PythonOp.Apart": handle, "prim::PythonOp.Convolution": convolution_macs},
            )
        )


def _count_by_operator(module: nn.Module, *inputs: Tensor) -> Counter[str]:
    return _trace(module, inputs, {})["module"]


def _trace(
    module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], **handles: Handle
) -> dict[str, Counter[str]]:
    """fvcore's counts by module (the whole is called "module") and operator."""
    call = _TensorsOnly(module, inputs, kwargs)
    analysis = _flop_count_analysis()(call, tuple(call.tensors(inputs, kwargs)))
    analysis.set_op_handle(**all_handles(), **handles).unsupported_ops_warnings(
        False
    ).uncalled_modules_warnings(False)
    analysis.tracer_warnings("all")  # those that say nothing are silenced here
    try:
        with (
            torch.no_grad(),
            only_counted(),
            _plain_operators(),
            _nothing_leaves_the_trace(),
            convolutions_as_one_operator(module),
        ):
            analysis.total()
    except Exception as error:
        if _ran_flex_attention(error):
            raise UnsupportedError(
                f"{type(module).__name__} calls FlexAttention, which torch.jit.trace cannot "
                "record; count it with another backend, "
                "such as scaled_dot_product_attention, whose products are those of FlexAttention "
                "without a block mask"
            ) from error
        if isinstance(error, ValueError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedError(
            f"{type(module).__name__} cannot be traced with these inputs: {reason}"
        ) from error
    unknown = analysis.unsupported_ops()
    if unknown:
        named = ", ".join(f"{name} ({times} times)" for name, times in sorted(unknown.items()))
        raise UnsupportedError(
            f"{type(module).__name__} runs operators that have no count: {named}; the count would "
            "be too small"
        )
    return analysis.by_module_and_operator()


def _ran_flex_attention(error: Exception) -> bool:
    """Whether the error came out of torch's flex_attention, which is never imported for this
    question."""
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    return flex is not None and any(
        frame.f_code is flex.flex_attention.__code__
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


class _TensorsOnly(nn.Module):
    """The call as the tracer wants it: tensors in, a tuple of tensors out, all other arguments
    fixed."""

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.module = module
        leaves, self.structure = tree_flatten((inputs, kwargs))
        self.fixed = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        of_each = [id(tensor) for tensor in self.tensors(inputs, kwargs)]
        self.places = {
            place: of_each.index(id(leaf))
            for place, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor)
        }

    @staticmethod
    def tensors(inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Each once: a module may ask whether its query is its key."""
        leaves = tree_flatten((inputs, kwargs))[0]
        return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}.values())

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.fixed)
        for place, which in self.places.items():
            leaves[place] = tensors[which]
        inputs, kwargs = tree_unflatten(leaves, self.structure)
        return tuple(
            leaf
            for leaf in tree_flatten(self.module(*inputs, **kwargs))[0]
            if isinstance(leaf, Tensor)
        )


@contextmanager
def _nothing_leaves_the_trace() -> Iterator[None]:
    """Raise where numpy computes: the tracer takes its results for constants, and would count
    nothing of them."""
    with warnings.catch_warnings(record=True) as caught:
        # Recorded even where the caller ignores warnings.
        warnings.simplefilter("always", torch.jit.TracerWarning)
        yield
    for warning in caught:
        if not issubclass(warning.category, torch.jit.TracerWarning):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
        elif "NumPy array" in str(warning.message):
            raise RuntimeError(
                "it makes a NumPy array of a tensor, and what NumPy computes cannot be counted; "
                "use torch's operators"
            )


@contextmanager
def _plain_operators() -> Iterator[None]:
    """Switch off torch's fused encoder layer, which would be one operator for a whole layer."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _flop_count_analysis() -> type:
    try:
        from fvcore.nn import FlopCountAnalysis
    except ImportError:
        raise ImportError(
            "count_flops needs fvcore; install it with: pip install 'attnzoo[cost]'", name="fvcore"
        ) from None
    return FlopCountAnalysis


def _report(counts: dict[str, Counter[str]]) -> FlopReport:
    """The two columns apart, and the modules under their own names."""
    inside = {
        "" if name == "module" else name.removeprefix("module."): found
        for name, found in counts.items()
        if name
    }
    macs = {
        name: {op: int(n) for op, n in found.items() if op not in ELEMENTWISE}
        for name, found in inside.items()
    }
    elementwise = {
        name: {op: int(n) for op, n in found.items() if op in ELEMENTWISE}
        for name, found in inside.items()
    }
    return FlopReport(
        macs=sum(macs[""].values()),
        elementwise=sum(elementwise[""].values()),
        by_module={name: sum(found.values()) for name, found in macs.items()},
        by_operator=macs[""],
        elementwise_by_module={name: sum(found.values()) for name, found in elementwise.items()},
        elementwise_by_operator=elementwise[""],
    )
