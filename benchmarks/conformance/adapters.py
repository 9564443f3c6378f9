"""Attentions of other libraries as functions of (q, k, v, is_causal=, key_mask=)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import attnzoo

FEATURES = 16  # of Performer


def of(path: str) -> Any:
    """What MODULE:NAME names."""
    module, name = path.split(":")
    return getattr(import_module(module), name)


def llama_layer() -> Any:
    """A layer of 4 heads over 2, by SDPA."""
    config = of("transformers:LlamaConfig")(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa"
    )
    return of("transformers.models.llama.modeling_llama:LlamaAttention")(config, 0)


def bert_layer() -> Any:
    """A layer of 4 heads, by its eager attention."""
    config = of("transformers:BertConfig")(
        hidden_size=32, num_attention_heads=4, attn_implementation="eager"
    )
    return of("transformers.models.bert.modeling_bert:BertSelfAttention")(config)


def performer() -> Callable[..., Any]:
    """FAVOR+ of performer-pytorch, causal where it is asked to be."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False) -> Tensor:
        made = of("performer_pytorch:FastAttention")(q.shape[3], FEATURES, causal=is_causal)
        made.projection_matrix = directions(q)
        return made(q, k, v)

    return attend


def performer_without_eps() -> Callable[..., Any]:
    """What FastAttention does with no mask, and with eps=0."""
    module = "performer_pytorch.performer_pytorch"

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kernel = partial(of(f"{module}:softmax_kernel"), projection_matrix=directions(q), eps=0.0)
        return of(f"{module}:linear_attention")(
            kernel(q, is_query=True), kernel(k, is_query=False), v
        )

    return attend


def directions(q: Tensor) -> Tensor:
    """Those that the variant draws, (features, head_dim), so that nothing else differs."""
    heads, head_dim = int(q.shape[1]), int(q.shape[3])
    attn = attnzoo.build("performer", heads, head_dim, num_features=FEATURES)
    return attn.oracle_arguments(0, 0, False)["projection"].to(q.dtype)


def efficient(bucket: int) -> Callable[..., Any]:
    """linear-attention-transformer's two functions, padded at the end to whole buckets where the
    length is not a multiple of one."""
    module = "linear_attention_transformer.linear_attention_transformer"

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        is_causal: bool = False,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        if not is_causal:
            return of(f"{module}:linear_attn")(q, k, v, key_mask)
        length = q.shape[2]
        missing = -length % bucket
        if missing:
            q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
            key_mask = None if key_mask is None else F.pad(key_mask, (0, missing))
        causal = of(f"{module}:causal_linear_attn")
        return causal(q, k, v, key_mask, bucket_size=bucket)[:, :, :length]

    return attend


def local_window() -> Callable[..., Any]:
    """local-attention, exact window and padded to whole windows."""

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        is_causal: bool = False,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        local = of("local_attention:LocalAttention")(
            window_size=4,
            causal=is_causal,
            look_forward=0 if is_causal else 1,
            autopad=True,
            exact_windowsize=True,
            use_rotary_pos_emb=False,
        )
        return local(q, k, v, mask=key_mask)

    return attend


def x_transformers(flash: bool) -> Callable[..., Any]:
    """Attend of x-transformers."""

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        is_causal: bool = False,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        made = of("x_transformers.attend:Attend")(causal=is_causal, heads=q.shape[1], flash=flash)
        mask = None if key_mask is None else key_mask[:, None, None]
        return made(q, k, v, mask=mask)[0]

    return attend
