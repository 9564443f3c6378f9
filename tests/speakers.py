"""Other libraries' attentions behind one call, for asking what their words mean.

A speaker is a function of torch tensors q, k and v in the library's own layout, and of its own
words for a window, causality, a mask of keys and a gate; what it does not take is left out. Its
answer is rows in the layout of q, of a recurrence beside the state. Each imports its library when
it is called.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Speaker:
    """How a library is asked.

    package: to install
    attend: f(q, k, v, window=, causal=, mask=) -> rows
    recur: f(q, k, v, decay=) -> rows (or None), state
    oracle: the variant that `recur` is
    function: MODULE:NAME of what the arguments are of; of onnx DOMAIN OPERATOR
    norm: MODULE:NAME of what divides queries and keys by their L2 norm
    claims: what it can be asked, names of fields of a `Spelling`
    """

    package: str
    claims: tuple[str, ...]
    attend: Callable[..., Tensor] | None = None
    recur: Callable[..., Any] | None = None
    oracle: str = "gla"
    function: str = ""
    norm: str = ""


def of(path: str) -> Any:
    """What MODULE:NAME names."""
    module, names = path.split(":")
    found = import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Any = None) -> Tensor:
    mask = None if mask is None else mask[:, None, None].expand(-1, -1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def flex(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sizes = (q.shape[0], None, q.shape[2], k.shape[2])
    told = (
        None
        if mask is None
        else create_block_mask(lambda b, h, i, j: mask[b, j], *sizes, device="cpu")
    )
    rows: Any = flex_attention(q, k, v, block_mask=told)
    return rows


def torch_layer(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """One head, whose projections do nothing."""
    width = q.shape[-1]
    layer = nn.MultiheadAttention(width, 1, bias=False, batch_first=True)
    with torch.no_grad():
        assert layer.in_proj_weight is not None
        layer.in_proj_weight.copy_(torch.eye(width).repeat(3, 1))
        layer.out_proj.weight.copy_(torch.eye(width))
        return layer(q, k, v, key_padding_mask=mask, need_weights=True)[0]


def transformers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Eager attention under the mask that transformers makes for a cache that holds the keys before
    the queries."""
    from transformers import DynamicCache, MistralConfig
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
    from transformers.models.llama.modeling_llama import eager_attention_forward

    config = MistralConfig(sliding_window=window, num_hidden_layers=1)
    config._attn_implementation = "eager"
    cache, held = DynamicCache(), k.shape[2] - q.shape[2]
    if held:
        cache.update(k[:, :, :held], v[:, :, :held], 0)
    make = create_causal_mask if window is None else create_sliding_window_causal_mask
    added = make(config, q[:, 0], mask, cache) if causal or mask is not None else None
    if added is not None and not causal:  # of padding alone: what the last query sees
        added = added[:, :, -1:].expand(-1, -1, q.shape[2], -1)
    module = nn.Module()
    module.num_key_value_groups = 1  # pyright: ignore[reportArgumentType]
    scaling = q.shape[-1] ** -0.5
    return eager_attention_forward(module, q, k, v, added, scaling=scaling)[0].transpose(1, 2)


def of_transformers(q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor) -> Any:
    """The gated delta rule of Qwen3-Next, whose heads stand behind the length."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    q, k, v, decay = (x.transpose(1, 2) for x in (q, k, v, decay))
    plain = inspect.unwrap(torch_recurrent_gated_delta_rule)  # not fla's, where it is installed
    rows, state = plain(q, k, v, decay, torch.ones_like(decay), None, output_final_state=True)
    return rows.transpose(1, 2), state


def fla(q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor) -> Any:
    return of("fla.ops.gla.naive:naive_recurrent_gla")(q, k, v, decay, output_final_state=True)


def attention_gym(q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor) -> Any:
    ones = torch.ones(q.shape[:-1], dtype=q.dtype)
    return of("attn_gym.linear.kda.naive:naive_recurrent_kda")(
        q, k, v, decay, ones, output_final_state=True
    )


def rwkv(q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor) -> tuple[None, Tensor]:
    """The state of a layer of one head that projects nothing, so that q, k and v are its input, and
    fades by the same factors at every token."""
    os.environ["RWKV_V7_ON"] = "1"
    mix = of("rwkv.model:RWKV_x070_TMix_seq")
    x = k[0, :, 0]
    width, zero = x.shape[1], torch.zeros(x.shape[1])
    eye, none = torch.eye(width), torch.zeros(width, 1)
    factor = decay[0, 0, 0].to(x)
    w0 = (factor.log() / -0.606531).logit()
    state = torch.zeros(1, width, width)
    mixes, lora = [zero] * 6, [none, none.T]
    told = [w0, *lora, zero + 40, *lora, zero, *lora, *lora, zero + 1, zero, zero[None]]
    weights = [eye, eye, eye, eye, zero + 1, zero]
    _, _, state, _ = mix(0, 1, width, x.clone(), zero, zero, state, *mixes, *told, *weights)
    return None, state[None]


def jax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    jax = import_module("jax")
    told: dict[str, Any] = {"is_causal": causal}
    if window is not None:
        told["local_window_size"] = (window, 0)
    if mask is not None:
        told["mask"] = jax.numpy.asarray(mask[:, None, None].numpy())
    arrays = (jax.numpy.asarray(x.numpy()) for x in (q, k, v))
    return torch.tensor(jax.device_get(jax.nn.dot_product_attention(*arrays, **told)))


def keras(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """`ops.dot_product_attention`; a window is one of `layers.GroupQueryAttention`, of one head
    that projects nothing."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = import_module("keras")
    if window is None:
        told = None if mask is None else mask[:, None, None].expand(-1, 1, q.shape[1], -1)
        rows: Any = keras.ops.dot_product_attention(q, k, v, mask=told, is_causal=causal)
        return rows
    width = q.shape[-1]
    layer = keras.layers.GroupQueryAttention(
        width, q.shape[2], q.shape[2], use_bias=False, sliding_window=window
    )
    flat = [x.flatten(2) for x in (q, v, k)]
    layer.build(*[x.shape for x in flat])
    size = q.shape[2] * width
    layer.set_weights([torch.eye(size).view(w.shape).numpy() for w in layer.get_weights()])
    return layer(*flat, use_causal_mask=causal).detach().view(q.shape)


def mlx(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    import numpy as np

    mx = import_module("mlx.core")
    told = "causal" if causal else None if mask is None else mx.array(mask[:, None, None].numpy())
    arrays = [mx.array(x.numpy()) for x in (q, k, v)]
    rows = mx.fast.scaled_dot_product_attention(*arrays, scale=q.shape[-1] ** -0.5, mask=told)
    return torch.tensor(np.array(rows))


def onnx(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    told: dict[str, Any] = {"is_causal": int(causal)}
    if window is not None:
        told["left_window_size"] = window
    given = {"q": q, "k": k, "v": v}
    if mask is not None:
        given["mask"] = mask[:, None, None].expand(-1, 1, q.shape[2], -1)
    return _evaluated("Attention", 25, given, ["rows"], **told)[0]


def onnx_linear(q: Tensor, k: Tensor, v: Tensor, *, decay: Tensor) -> Any:
    given = {"q": q.flatten(2), "k": k.flatten(2), "v": v.flatten(2), "": None}
    given["decay"] = decay.flatten(2)
    heads = {"q_num_heads": q.shape[2], "kv_num_heads": k.shape[2], "update_rule": "gated"}
    rows, state = _evaluated("LinearAttention", 27, given, ["rows", "state"], **heads)
    return rows.view(*q.shape[:3], -1), state


def _evaluated(
    name: str, opset: int, given: dict[str, Any], outputs: list[str], **told: Any
) -> list[Tensor]:
    """One operator by the reference evaluator of onnx."""
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    node = helper.make_node(name, list(given), outputs, **told)
    here = {one: x.contiguous().numpy() for one, x in given.items() if x is not None}
    kinds = {one: helper.np_dtype_to_tensor_dtype(x.dtype) for one, x in here.items()}
    graph = helper.make_graph(
        [node],
        name,
        [helper.make_tensor_value_info(one, kinds[one], x.shape) for one, x in here.items()],
        [helper.make_tensor_value_info(one, TensorProto.FLOAT, None) for one in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    return [torch.tensor(x) for x in ReferenceEvaluator(model).run(None, here)]


def group_query(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, causal: bool = False
) -> Tensor:
    """onnxruntime's GroupQueryAttention, which is always causal."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper

    batch, length, heads, _ = q.shape
    told: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": heads,
        "local_window_size": window or -1,
    }
    names = ["q", "k", "v", "", "", "seqlens", "total"]
    node = helper.make_node("GroupQueryAttention", names, ["rows"], domain="com.microsoft", **told)
    ints = {"seqlens": [batch], "total": [1]}
    floats = [helper.make_tensor_value_info(one, TensorProto.FLOAT, None) for one in "qkv"]
    sizes = [helper.make_tensor_value_info(one, TensorProto.INT32, ints[one]) for one in ints]
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "one", floats + sizes, [rows])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    given = {one: x.flatten(2).numpy() for one, x in (("q", q), ("k", k), ("v", v))}
    given["seqlens"] = np.full([batch], length - 1, dtype=np.int32)
    given["total"] = np.array([length], dtype=np.int32)
    return torch.tensor(session.run(None, given)[0]).view(q.shape)


def multi_head(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """onnxruntime's MultiHeadAttention."""
    import onnxruntime
    from onnx import TensorProto, helper

    names = ["q", "k", "v", "", *([] if mask is None else ["mask"])]
    told: dict[str, Any] = {"num_heads": q.shape[2], "unidirectional": int(causal)}
    node = helper.make_node("MultiHeadAttention", names, ["rows"], domain="com.microsoft", **told)
    given = {one: x.flatten(2).numpy() for one, x in (("q", q), ("k", k), ("v", v))}
    kinds = dict.fromkeys(given, TensorProto.FLOAT)
    if mask is not None:
        given["mask"], kinds["mask"] = mask.int().numpy(), TensorProto.INT32
    inputs = [helper.make_tensor_value_info(one, kinds[one], x.shape) for one, x in given.items()]
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, None)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "one", inputs, [rows])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return torch.tensor(session.run(None, given)[0]).view(q.shape)


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    local = of("local_attention:LocalAttention")(
        window_size=window or q.shape[2],
        causal=causal,
        autopad=True,
        exact_windowsize=True,
        use_rotary_pos_emb=False,
    )
    return local(q, k, v, mask=mask)


def x_transformers(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    mask = None if mask is None else mask[:, None, None]
    return of("x_transformers.attend:Attend")(causal=causal, heads=q.shape[1])(q, k, v, mask=mask)[
        0
    ]


def xformers(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, causal: bool = False
) -> Tensor:
    """The masks that it makes, added to scores."""
    from xformers.ops.fmha import attn_bias

    bias = attn_bias.LowerTriangularMask()
    if window is not None:
        bias = attn_bias.LowerTriangularFromBottomRightLocalAttentionMask(window)
    added = bias.materialize((q.shape[1], k.shape[1]))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added).transpose(1, 2)


SEEN = ("layout", "alignment", "hidden_row", "mask")
GATED = ("layout", "decay", "state", "state_dtype")
CALLED = ("arguments", "scale")
TORCH = "torch.nn.functional"
#: By the name of the spelling.
SPEAKERS = {
    "torch.sdpa": Speaker(
        "torch", (*SEEN, *CALLED), sdpa, function=f"{TORCH}:scaled_dot_product_attention"
    ),
    "torch.MultiheadAttention": Speaker(
        "torch",
        ("layout", "hidden_row", "mask", *CALLED),
        torch_layer,
        function="torch.nn:MultiheadAttention.forward",
    ),
    "torch.flex_attention": Speaker(
        "torch",
        ("layout", "hidden_row", "mask", *CALLED),
        flex,
        function="torch.nn.attention.flex_attention:flex_attention",
    ),
    "torch.varlen_attn": Speaker(
        "torch", ("arguments",), function="torch.nn.attention.varlen:varlen_attn"
    ),
    "transformers": Speaker(
        "transformers",
        (*SEEN, "window_keys", "decay", "state", "state_dtype", "l2_norm", *CALLED),
        transformers,
        of_transformers,
        "gated_deltanet",
        "transformers.models.llama.modeling_llama:eager_attention_forward",
        "transformers.models.qwen3_next.modeling_qwen3_next:l2norm",
    ),
    "fla": Speaker(
        "fla-core",
        (*GATED, *CALLED),
        recur=fla,
        function="fla.ops.gla.naive:naive_recurrent_gla",
    ),
    "attention-gym": Speaker(
        "attn-gym",
        (*GATED, *CALLED),
        recur=attention_gym,
        oracle="kda",
        function="attn_gym.linear.kda.naive:naive_recurrent_kda",
    ),
    "rwkv": Speaker("rwkv", ("state", "state_dtype"), recur=rwkv, oracle="rwkv7"),
    "xformers": Speaker(
        "xformers",
        ("window_keys", "alignment", "arguments"),
        xformers,
        function="xformers.ops:memory_efficient_attention",
    ),
    "jax.nn": Speaker(
        "jax", (*SEEN, "window_keys", *CALLED), jax, function="jax.nn:dot_product_attention"
    ),
    "keras": Speaker(
        "keras",
        (*SEEN, "window_keys", *CALLED),
        keras,
        function="keras.ops:dot_product_attention",
    ),
    "mlx": Speaker(
        "mlx", (*SEEN, *CALLED), mlx, function="mlx.core:fast.scaled_dot_product_attention"
    ),
    "onnx.Attention": Speaker(
        "onnx", (*SEEN, "window_keys", *CALLED), onnx, function="onnx Attention 25"
    ),
    "onnx.LinearAttention": Speaker(
        "onnx", (*GATED, *CALLED), recur=onnx_linear, function="onnx LinearAttention 27"
    ),
    "onnxruntime.GroupQueryAttention": Speaker(
        "onnxruntime", ("layout", "window_keys", "scale"), group_query
    ),
    "onnxruntime.MultiHeadAttention": Speaker("onnxruntime", (*SEEN, "scale"), multi_head),
    "local-attention": Speaker(
        "local-attention",
        ("layout", "window_keys", "mask", *CALLED),
        local_attention,
        function="local_attention:LocalAttention.forward",
    ),
    "x-transformers": Speaker(
        "x-transformers",
        (*SEEN, *CALLED),
        x_transformers,
        function="x_transformers.attend:Attend.forward",
    ),
}
