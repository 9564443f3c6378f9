"""What each operator of a traced graph costs: one handle an operator, and the list of those that
multiply nothing.

A handle takes the inputs and outputs of a node (`torch._C.Value`) and returns what fvcore adds up.
Products return multiply-accumulates (MACs) from exact integers; everything in ELEMENTWISE goes to a
column of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

Handle = Callable[[list[Any], list[Any]], "int | Counter[str]"]

SOFTMAX_OPERATIONS = 3  # a score: exponential, sum, division

ELEMENTWISE: dict[str, int] = {
    "softmax": SOFTMAX_OPERATIONS,
    "log_softmax": SOFTMAX_OPERATIONS,
    **dict.fromkeys(
        (
            "exp",
            "exp2",
            "log",
            "sin",
            "cos",
            "tan",
            "tanh",
            "sigmoid",
            "log_sigmoid",
            "softplus",
            "erf",
            "elu",
            "gelu",
            "silu",
            "mish",
        ),
        1,
    ),
    **dict.fromkeys(("sqrt", "rsqrt", "reciprocal", "div", "linalg_vector_norm"), 1),
    "rms_norm": 4,
    **dict.fromkeys(("layer_norm", "group_norm", "instance_norm", "batch_norm"), 5),
    **dict.fromkeys(("upsample_nearest2d", "adaptive_avg_pool2d"), 1),
    **dict.fromkeys(("upsample_bilinear2d", "grid_sampler"), 4),
}
"""Operations for each number of the output, by operator: functions, divisions, normalisations."""

# Sums, comparisons, masks, copies, indices and shapes, beside those that fvcore ignores by itself.
_IGNORED = """
Bool Float FloatImplicit IntImplicit __lshift__ __or__ __rshift__ __xor__ abs add addcmul add_ alias
all amax amin any argmax argsort as_strided avg_pool2d bernoulli bitwise_and bitwise_or bool
broadcast_tensors broadcast_to ceil clamp_max clamp_min clone cummax cumsum diagonal diff dim
dropout_ embedding empty_like expand_as eye feature_dropout fill_ flip float hardtanh im2col
index_select isfinite isinf isnan item le leaky_relu lift_fresh logical_and logical_not logical_or
lt mT masked_fill_ matrix_H max_pool2d maximum mean meshgrid min minimum movedim mul mul_ ne neg
new_ones norm numel numpy_T one_hot ones_like pad pow rand rand_like randn randn_like repeat
repeat_interleave resolve_conj round rsub scalar_tensor scatter scatter_ searchsorted sign sort
square sub sub_ sum take_along_dim tensor_split tile topk tril tril_ triu type unflatten unfold
nan_to_num view_as where zero_
"""

# The zoo's own autograd functions whose forward is a view.
VIEWS = ("_Slices",)


def shape_of(value: Any) -> list[int]:
    """Sizes of a traced tensor. Raises ValueError where the trace does not know them."""
    sizes = value.type().sizes() if value.isCompleteTensor() else None
    if sizes is None:
        raise ValueError(
            f"the trace does not know the shape of {value.debugName()!r}; give tensors of fixed "
            "shapes"
        )
    return sizes


def contraction(operand: int) -> Handle:
    """Products of two matrices, batched or broadcast: every number of the output sums over the last
    dimension of input `operand`."""

    def count(inputs: list[Any], outputs: list[Any]) -> int:
        return prod(shape_of(outputs[0])) * shape_of(inputs[operand])[-1]

    return count


def scaled_dot_product_attention(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Scores and their product with v for every query head, grouped keys included. is_causal counts
    in full, as torch counts it."""
    q, k, v = (shape_of(value) for value in inputs[:3])
    return Counter(
        {
            "scaled_dot_product_attention": attention_macs(q, k, v),
            "softmax": SOFTMAX_OPERATIONS * prod(q[:-1]) * k[-2],
        }
    )


def attention_macs(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> int:
    """Scores and their product with v, of shapes (..., length, width), every query with every
    key."""
    return prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def einsum(inputs: list[Any], outputs: list[Any]) -> int:
    """Pair by pair in the order that torch contracts them."""
    path = inputs[2].toIValue() if len(inputs) > 2 else None
    return einsum_macs(
        inputs[0].toIValue(), [shape_of(value) for value in inputs[1].node().inputs()], path
    )


def einsum_macs(
    equation: str, shapes: Sequence[Sequence[int]], path: Sequence[int] | None = None
) -> int:
    """MACs of torch.einsum.

    path: torch's flat list of pairs, each product going to the end; by default from left to right.

    A pair that sums nothing is an elementwise product and counts 0, as every other one does.
    """
    operands, output = _labelled(equation, shapes)
    pairs = (
        [sorted(pair) for pair in zip(path[::2], path[1::2], strict=True)]
        if path
        else [[0, 1]] * (len(operands) - 1)
    )
    macs = 0
    for first, second in pairs:
        right, left = operands.pop(second), operands.pop(first)
        later = output.union(*operands)
        product = {
            label: max(left.get(label, 1), right.get(label, 1)) for label in {**left, **right}
        }
        kept = {label: size for label, size in product.items() if label in later}
        # An axis of one operand alone that the result does not have is summed before the product.
        summed = [
            size
            for label, size in product.items()
            if label not in later and min(left.get(label, 1), right.get(label, 1)) > 1
        ]
        macs += prod(kept.values()) * prod(summed) if summed else 0
        operands.insert(len(operands) if path else 0, kept)
    return macs


def _labelled(
    equation: str, shapes: Sequence[Sequence[int]]
) -> tuple[list[dict[str, int]], set[str]]:
    """Size of every label of every operand, and the labels of the output. The dimensions of "..."
    are labelled 0, 1, ... from the right."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    operands = []
    for term, shape in zip(left.split(","), shapes, strict=True):
        before, dots, after = term.partition("...")
        hidden = (
            [str(place) for place in reversed(range(len(shape) - len(before) - len(after)))]
            if dots
            else []
        )
        operands.append(dict(zip([*before, *hidden, *after], shape, strict=True)))
    labels = left.replace(",", "").replace("...", "")
    named = (
        set(right.replace("...", ""))
        if arrow
        else {label for label in labels if labels.count(label) == 1}
    )
    hidden = {label for operand in operands for label in operand if label.isdigit()}
    return operands, named | (hidden if "..." in right or not arrow else set())


#: Of a recurrent layer: gates, and the sigmoids and hyperbolic tangents of one hidden unit.
RECURRENT = {"gru": (3, 2, 1), "lstm": (4, 3, 2), "rnn_tanh": (1, 0, 1), "rnn_relu": (1, 0, 0)}


def recurrent(name: str) -> Handle:
    """A recurrent layer of torch's: every token meets every matrix of every layer and direction
    once."""
    gates, sigmoids, tangents = RECURRENT[name]

    def count(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        tokens = prod(shape_of(inputs[0])[:-1])
        # The weights come last.
        listed = [value for value in inputs[1:4] if value.node().kind() == "prim::ListConstruct"]
        matrices = [shape for shape in map(shape_of, listed[-1].node().inputs()) if len(shape) == 2]
        # Each unit has its rows in two matrices.
        units = tokens * sum(rows for rows, _ in matrices) // (2 * gates)
        return Counter(
            {
                name: tokens * sum(map(prod, matrices)),
                "sigmoid": sigmoids * units,
                "tanh": tangents * units,
            }
        )

    return count


def _per_output(name: str, rate: int) -> Handle:
    def count(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        return Counter({name: rate * prod(shape_of(outputs[0]))})

    return count


def _nothing(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    return Counter()


def products() -> dict[str, Handle]:
    """Handle of every operator that multiplies matrices, by its name in the graph."""
    return {
        **{
            f"aten::{name}": contraction(0)
            for name in ("matmul", "bmm", "mm", "mv", "dot", "linear")
        },
        **{f"aten::{name}": contraction(1) for name in ("addmm", "baddbmm", "addmv")},
        **{f"aten::{name}": recurrent(name) for name in RECURRENT},
        "aten::einsum": einsum,
        "aten::scaled_dot_product_attention": scaled_dot_product_attention,
    }


def all_handles() -> dict[str, Handle | None]:
    """Handle of every operator by its name in the graph; None: ignored."""
    elementwise = {
        f"aten::{name}{in_place}": _per_output(name, rate)
        for name, rate in ELEMENTWISE.items()
        for in_place in ("", "_")
    }
    # fvcore cannot ignore a Python function by its name.
    views = {f"prim::PythonOp.{name}": _nothing for name in VIEWS}
    return {
        **dict.fromkeys(f"aten::{name}" for name in _IGNORED.split()),
        **products(),
        **elementwise,
        **views,
    }
