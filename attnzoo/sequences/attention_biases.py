"""Other libraries' mask objects as what a call of an attention takes: torch's CausalBias and
BlockMask, and the attention biases of xformers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import UnsupportedError
from attnzoo.sequences.masks import read_mask
from attnzoo.sequences.segments import from_cu_seqlens


@dataclass(frozen=True)
class BiasArguments:
    """What a mask object says.

    key_mask, is_causal, segments: arguments of `Attention.forward`, for q and k of `batch_size`
        rows; key_mask and segments are (batch_size, key_length) or None
    window: keys that the attention must show on each side, the query's own included, as
        `sliding_window` has them; None: all
    batch_size: rows of q and k. 1 where the object speaks of one flattened row; None: any number.
    """

    key_mask: Tensor | None = None
    is_causal: bool = False
    segments: Tensor | None = None
    window: int | None = None
    batch_size: int | None = None


def arguments_of(bias: Any, query_length: int, key_length: int) -> BiasArguments:
    """What a mask object says, in the arguments of this library.

    bias: torch.nn.attention.bias.CausalBias, torch.nn.attention.flex_attention.BlockMask (its
        mask is formed whole and read), or one of xformers.ops.fmha.attn_bias: LowerTriangularMask,
        LowerTriangularFromBottomRightMask, LocalAttentionFromBottomRightMask, BlockDiagonalMask,
        BlockDiagonalCausalMask, their FromBottomRight and LocalAttention forms,
        BlockDiagonalPaddedKeysMask, BlockDiagonalCausalWithOffsetPaddedKeysMask
    query_length, key_length: of q and k as the object's own library takes them: flattened rows for
        the block-diagonal ones. With padded keys the arguments are for (batch_size, ...) rows.
    raises: ValueError on lengths that are not the object's, UnsupportedError on an object that is
        not known or says more than these arguments can
    """
    from torch.nn.attention.bias import CausalBias
    from torch.nn.attention.flex_attention import BlockMask

    if isinstance(bias, CausalBias):
        return _of_causal_bias(bias, query_length, key_length)
    if isinstance(bias, BlockMask):
        return _of_block_mask(bias, query_length, key_length)
    name = type(bias).__name__
    if not type(bias).__module__.startswith("xformers."):
        raise UnsupportedError(
            f"{name} is not a mask object that attnzoo reads; give key_mask, is_causal and segments"
        )
    if name in ("LowerTriangularMask", "LowerTriangularFromBottomRightMask"):
        if name == "LowerTriangularMask":
            _check_square(name, query_length, key_length)
        return BiasArguments(is_causal=True)
    if name == "LowerTriangularFromBottomRightLocalAttentionMask":
        return BiasArguments(is_causal=True, window=bias._window_size)
    if name == "LocalAttentionFromBottomRightMask":
        return _of_local(bias.window_left, bias.window_right)
    if name in BLOCKS:
        return _of_blocks(bias, query_length, key_length)
    if name in PADDED_KEYS:
        return _of_padded_keys(bias, query_length, key_length)
    raise UnsupportedError(
        f"{name} says more than key_mask, is_causal, segments and a window can; lay it out with "
        "its materialize() and give attn_mask to attention 'standard'"
    )


#: xformers' masks of blocks along the diagonal, and whether they are causal.
BLOCKS = {
    "BlockDiagonalMask": False,
    "BlockDiagonalCausalMask": True,
    "BlockDiagonalCausalFromBottomRightMask": True,
    "BlockDiagonalCausalLocalAttentionMask": True,
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": True,
}
#: Those whose keys are padded behind to one length, and whether they are causal.
PADDED_KEYS = {
    "BlockDiagonalPaddedKeysMask": False,
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": True,
}


def _of_causal_bias(bias: Any, query_length: int, key_length: int) -> BiasArguments:
    _check_lengths("CausalBias", (bias.seq_len_q, bias.seq_len_kv), (query_length, key_length))
    if bias.variant.name == "UPPER_LEFT":
        _check_square("an upper-left CausalBias", query_length, key_length)
    return BiasArguments(is_causal=True)


def _of_block_mask(bias: Any, query_length: int, key_length: int) -> BiasArguments:
    from torch.nn.attention.flex_attention import create_mask

    batch_size, heads, *lengths = bias.shape
    _check_lengths("BlockMask", tuple(lengths), (query_length, key_length))
    device = str(bias.kv_num_blocks.device)
    read = read_mask(create_mask(bias.mask_mod, batch_size, heads, *lengths, device=device))
    if read is None:
        raise UnsupportedError(
            "this BlockMask says more than causality, padding and packing; give the attention that "
            "has its pattern, or attn_mask to attention 'standard'"
        )
    rows = None if read.key_mask is None and read.segments is None else batch_size
    return BiasArguments(read.key_mask, read.is_causal, read.segments, batch_size=rows)


def _of_local(left: int, right: int) -> BiasArguments:
    if right not in (0, left):
        raise UnsupportedError(
            f"LocalAttentionFromBottomRightMask shows {left} keys before a query and {right} "
            "behind it; a window has as many on both sides, or is causal: make window_right 0 or "
            "window_left"
        )
    return BiasArguments(is_causal=right == 0, window=left + 1)


def _of_blocks(bias: Any, query_length: int, key_length: int) -> BiasArguments:
    name = type(bias).__name__
    queries, keys = bias.q_seqinfo.seqstart_py, bias.k_seqinfo.seqstart_py
    _check_lengths(name, (queries[-1], keys[-1]), (query_length, key_length))
    window = getattr(bias, "_window_size", None)
    if len(keys) == 2 and "FromBottomRight" in name:
        return BiasArguments(is_causal=True, window=window)
    if list(queries) != list(keys):
        raise UnsupportedError(
            f"{name} has blocks of other lengths in queries and keys, {list(queries)} and "
            f"{list(keys)}; segments packs both alike: run the blocks one by one, or padded"
        )
    segments = from_cu_seqlens(torch.as_tensor(bias.k_seqinfo.seqstart), key_length)
    return BiasArguments(is_causal=BLOCKS[name], segments=segments, window=window, batch_size=1)


def _of_padded_keys(bias: Any, query_length: int, key_length: int) -> BiasArguments:
    name = type(bias).__name__
    starts, lengths = bias.q_seqinfo.seqstart_py, bias.k_seqinfo.seqlen_py
    padding, rows = bias.k_seqinfo.padding, len(lengths)
    _check_lengths(name, (starts[-1], rows * padding), (query_length, key_length))
    queries = {after - before for before, after in pairwise(starts)}
    if len(queries) > 1:
        raise UnsupportedError(
            f"{name} has blocks of {sorted(queries)} queries; only blocks of one length are rows "
            "of a batch: pad the queries"
        )
    slots = torch.arange(padding, device=bias.k_seqinfo.seqlen.device)
    key_mask = slots < bias.k_seqinfo.seqlen[:, None]
    causal = PADDED_KEYS[name] and queries != {1}
    if causal and min(lengths) < padding:
        raise UnsupportedError(
            f"{name} has {queries.pop()} queries a block that end at the last key before its "
            "padding, and a causal call has them end at the last slot; move the padding ahead of "
            "the keys"
        )
    return BiasArguments(key_mask, causal, batch_size=rows)


def _check_lengths(name: str, own: tuple[int, ...], given: tuple[int, int]) -> None:
    if tuple(own) != given:
        raise ValueError(
            f"{name} is of {own[0]} queries and {own[1]} keys, and the call has {given[0]} and "
            f"{given[1]}; make it of the call's lengths"
        )


def _check_square(name: str, query_length: int, key_length: int) -> None:
    if query_length != key_length:
        raise UnsupportedError(
            f"{name} puts query i at key i, and with {query_length} queries and {key_length} keys "
            "a causal call of attnzoo puts the last query at the last key; use the lower-right "
            "(from bottom right) form, or cut the longer of both"
        )
