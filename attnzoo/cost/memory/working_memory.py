"""Memory that torch's operators take on the CPU while they run, beside their inputs and outputs:
read in torch's kernels, and tested against the allocator.

What is small beside the operands, such as what oneDNN needs to multiply one tile, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
CHANNELS = 16  # that oneDNN lays side by side in a convolution
PLAIN_CHANNELS = 3
FLASH_KEYS = 512  # that a thread of the fused softmax works on at a time
FLASH_ROWS = ((768, 256), (192, 64), (0, 32))  # so many of its rows from so many queries on
PACKED = 64  # rows and keys from which on the fused softmax packs what it multiplies

Working = Callable[..., int]


def working_bytes(func: Any, args: tuple[Any, ...], found: Any) -> int:
    """Bytes beyond the operands and the results of one operator."""
    known = _working_of(func)
    return 0 if known is None else known(args, found)


@cache
def _working_of(func: Any) -> Working | None:
    pointwise = _promoted if torch.Tag.pointwise in func.tags else None
    return OPERATORS.get(func.overloadpacket, pointwise)


def flash(args: tuple[Any, ...], found: Any) -> int:
    """torch's fused softmax: scores, maximum and sum of a row, and the output of a few rows, for
    every thread; in half precision the scores again, and on AMX k and v as it takes them."""
    q, k, *_ = args
    rows, keys = _tile(q, k)
    scores = rows * keys
    each = (scores + 2 * rows + rows * q.shape[3]) * _sum_bytes(q)
    packed = 0
    if q.dtype in HALF:
        each += scores * q.itemsize
        if _packs(q, k):
            each += keys * q.shape[3] * q.itemsize
            packed = 2 * q.shape[0] * q.shape[1] * k.shape[2] * k.shape[3] * k.itemsize
    return torch.get_num_threads() * each + packed


def flash_backward(args: tuple[Any, ...], found: Any) -> int:
    """Scores and their gradient for every thread, one sum a row, and the output's gradient with the
    heads inside the length."""
    gradient, q, k, *_ = args
    rows, keys = _tile(q, k)
    scores = 2 * rows * keys
    each = scores * _sum_bytes(q) + (scores * q.itemsize if q.dtype in HALF else 0)
    relaid = 0 if gradient.transpose(1, 2).is_contiguous() else gradient.nbytes
    return torch.get_num_threads() * each + rows * _sum_bytes(q) + relaid


def _tile(q: Tensor, k: Tensor) -> tuple[int, int]:
    """Rows and keys of the scores that a thread holds."""
    rows = next(rows for start, rows in FLASH_ROWS if q.shape[2] >= start)
    return min(rows, q.shape[2]), min(FLASH_KEYS, k.shape[2])


def _packs(q: Tensor, k: Tensor) -> bool:
    return (
        q.dtype == torch.bfloat16 and _has_amx() and q.shape[2] >= PACKED and k.shape[2] >= PACKED
    )


@cache
def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


def _sum_bytes(x: Tensor) -> int:
    return 4 if x.dtype in HALF else x.itemsize


def _convolution(args: tuple[Any, ...], found: Any) -> int:
    """What goes in and what comes out in blocks of channels; what comes out is then laid out as
    asked."""
    x, weight, *_ = args
    before, after = _blocked_input(x, weight), _blocked(found)
    return max(before + after - found.nbytes, after)


def _convolution_backward(args: tuple[Any, ...], found: Any) -> int:
    """First for the gradient of what went in, then for that of the weight."""
    gradient, x, weight, *_ = args
    to_input = 0 if found[0] is None else _blocked(x) - x.nbytes
    return _blocked(gradient) + max(to_input, _blocked_input(x, weight))


def _blocked_input(x: Tensor, weight: Tensor) -> int:
    """0 of a picture's few channels, which are read as they lie."""
    is_plain = x.shape[1] <= PLAIN_CHANNELS and weight.shape[1] == x.shape[1]
    return 0 if is_plain else _blocked(x)


def _blocked(x: Tensor) -> int:
    """Bytes of x with whole blocks of channels."""
    return x.nbytes // x.shape[1] * (-(-x.shape[1] // CHANNELS) * CHANNELS) if x.numel() else 0


def _softmax(args: tuple[Any, ...], found: Any) -> int:
    """Copies of what is not contiguous."""
    return sum(x.nbytes for x in _tensors(args) if not x.is_contiguous())


def _reduction(args: tuple[Any, ...], found: Any) -> int:
    """The input in the dtype of the sums, where that is another."""
    (x, *_), out = args, found
    return x.numel() * out.itemsize if x.dtype != out.dtype and x.numel() > out.numel() else 0


def _running(args: tuple[Any, ...], found: Any) -> int:
    return found.nbytes if args[0].dtype != found.dtype else 0


def _scatter(args: tuple[Any, ...], found: Any) -> int:
    """In half precision the sums in float32."""
    return args[0].numel() * 4 if args[0].dtype in HALF else 0


def _product(args: tuple[Any, ...], found: Any) -> int:
    """Copies of factors that no kernel can read as they lie; in half precision one matrix as oneDNN
    packs it."""
    factors = [x for x in _tensors(args) if x.dim() >= 2][-2:]
    if len(factors) < 2:
        return 0
    copied = sum(x.nbytes for x in factors if _is_copied(x))
    matrix = factors[1]
    packed = matrix.shape[-2] * matrix.shape[-1] * matrix.itemsize if matrix.dtype in HALF else 0
    return copied + packed


def _is_copied(x: Tensor) -> bool:
    if x.dtype in HALF and x.dim() == 3 and x.shape[0] > 1 and x.stride(0) == 0:
        return True
    return 1 not in x.stride()[-2:] and min(x.shape[-2:]) > 1


def _promoted(args: tuple[Any, ...], found: Any) -> int:
    """Operands as the dtype that they are computed in, where that is another."""
    given = [x for x in _tensors(args) if x.dim() > 0]
    if all(x.dtype == given[0].dtype for x in given):
        return 0
    common = reduce(torch.promote_types, [x.dtype for x in given])
    return sum(x.numel() * common.itemsize for x in given if x.dtype != common)


def _nothing(args: tuple[Any, ...], found: Any) -> int:
    return 0


def _tensors(args: tuple[Any, ...]) -> list[Tensor]:
    return [x for x in args if isinstance(x, Tensor)]


OPERATORS: dict[Any, Working] = {
    aten._scaled_dot_product_flash_attention_for_cpu: flash,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flash_backward,
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
    aten._softmax: _softmax,
    aten._log_softmax: _softmax,
    aten._softmax_backward_data: _softmax,
    aten._log_softmax_backward_data: _softmax,
    aten.sum: _reduction,
    aten.mean: _reduction,
    aten.cumsum: _running,
    aten.scatter: _scatter,
    aten.scatter_: _scatter,
    aten.scatter_add: _scatter,
    aten.scatter_add_: _scatter,
    aten.mm: _product,
    aten.addmm: _product,
    aten.bmm: _product,
    aten.baddbmm: _product,
    # pointwise, of operands whose dtypes may differ
    aten.where: _nothing,
    aten.masked_fill: _nothing,
    aten.masked_fill_: _nothing,
    aten.copy_: _nothing,
    aten._to_copy: _nothing,
}
