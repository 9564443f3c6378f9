"""MultiheadAttention around a core whose queries and keys are one tensor: one projection for both,
and what cannot have it says so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import PROCESSES, in_two_processes
from torch import Tensor, nn

import attnzoo
from attnzoo import UnsupportedError

WIDTH, HEADS = 12, 2
SHARED: dict[str, Any] = {"share_qk": True, "num_buckets": 4, "num_hashes": 2, "chunk_size": 4}


def module(bias: bool = True, **options: Any) -> attnzoo.MultiheadAttention:
    torch.manual_seed(0)
    return attnzoo.MultiheadAttention(
        WIDTH,
        HEADS,
        bias=bias,
        attention="reformer",
        attention_options=SHARED,
        **{"batch_first": True, **options},
    )


def inputs(length: int = 21) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(1))


def by_hand(attn: attnzoo.MultiheadAttention, x: Tensor, value: Tensor, **masks: Any) -> Tensor:
    """Two linear layers, the core, and one more."""
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    biases = (None, None) if bias is None else (bias[:WIDTH], bias[WIDTH:])
    qk, v = (
        F.linear(of, rows, part).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for of, rows, part in zip((x, value), (weight[:WIDTH], weight[WIDTH:]), biases, strict=True)
    )
    return attn.out_proj(attn.attention(qk, qk, v, **masks).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("bias", [False, True])
def test_one_projection_for_both(bias: bool) -> None:
    attn = module(bias)
    torch.manual_seed(0)
    of_torch = nn.MultiheadAttention(WIDTH, HEADS, bias=bias)
    rows = [*range(WIDTH), *range(2 * WIDTH, 3 * WIDTH)]
    assert torch.equal(attn.in_proj_weight, of_torch.in_proj_weight[rows]) and torch.equal(
        attn.out_proj.weight, of_torch.out_proj.weight
    )
    assert sum(p.numel() for p in attn.parameters()) == 3 * WIDTH * WIDTH + bias * 3 * WIDTH


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("other_values", [False, True])
def test_equals_the_core_between_its_projections(
    other_values: bool, bias: bool, is_causal: bool
) -> None:
    attn, x = module(bias), inputs().requires_grad_()
    value = inputs().flip(0) if other_values else x
    padding = torch.arange(21) >= torch.tensor([[21], [13]])
    out, weights = attn(x, x, value, key_padding_mask=padding, is_causal=is_causal, attn_mask=None)
    wanted = by_hand(attn, x, value, key_mask=~padding, is_causal=is_causal)
    torch.testing.assert_close(out, wanted)
    assert weights is not None and weights.shape == (2, 21, 21)
    upstream, leaves = (
        torch.randn(out.shape, generator=torch.Generator().manual_seed(2)),
        [x, *attn.parameters()],
    )
    for one, other in zip(
        torch.autograd.grad(out, leaves, upstream),
        torch.autograd.grad(wanted, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
        assert float(one.norm()) > 0


def test_other_layouts() -> None:
    x = inputs()
    wanted = module()(x, x, x)[0]
    along, first = x.transpose(0, 1), x[0]
    torch.testing.assert_close(
        module(batch_first=False)(along, along, along)[0].transpose(0, 1), wanted
    )
    torch.testing.assert_close(module()(first, first, first)[0], wanted[0])


def test_in_torchs_layer_in_both_modes() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, 0.0, batch_first=True)
    layer.self_attn = module()
    x = inputs()
    hidden = layer.norm1(x + by_hand(module(), x, x))
    wanted = layer.norm2(hidden + layer.linear2(F.relu(layer.linear1(hidden))))
    torch.testing.assert_close(layer.train()(x), wanted)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), wanted)


def test_its_state_travels_and_torchs_is_refused() -> None:
    attn, x = module(), inputs()
    torch.manual_seed(5)
    other = attnzoo.MultiheadAttention(
        WIDTH, HEADS, batch_first=True, attention="reformer", attention_options=SHARED
    )
    other.load_state_dict(attn.state_dict())
    assert torch.equal(other(x, x, x)[0], attn(x, x, x)[0])
    with pytest.raises(
        ValueError,
        match="in_proj_weight projects queries and keys apart, and this module has one projection "
        "for both",
    ):
        attn.load_state_dict(nn.MultiheadAttention(WIDTH, HEADS).state_dict())
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, HEADS, 16, 0.0, batch_first=True), 1
    )
    with pytest.raises(
        UnsupportedError,
        match=r"layer 0 \(layers.0.self_attn\): the model projects queries and keys apart",
    ):
        attnzoo.swap(model, "reformer", share_qk=True)


def test_bad_calls() -> None:
    x = inputs()
    with pytest.raises(ValueError, match="query and key must be one tensor: reformer shares them"):
        module()(x, x.clone(), x)
    with pytest.raises(UnsupportedError, match="kdim=6 and vdim=12 must be embed_dim=12"):
        module(kdim=6)


def test_its_macs_are_counted() -> None:
    pytest.importorskip("fvcore")
    attn, x = module().to("meta"), inputs().to("meta")
    core = attn.attention.cost(2, 21)
    assert (
        attnzoo.count_flops(attn, x, x, x, need_weights=False).macs
        == core.macs + 3 * 2 * 21 * WIDTH**2
    )


def by_heads() -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from attnzoo.integrations.tensor_parallel import HeadParallel

    attn = module()
    split: Any = copy.deepcopy(attn)
    parallelize_module(split, init_device_mesh("cpu", (PROCESSES,)), HeadParallel())
    found = []
    for one in (attn, split):
        x = inputs().requires_grad_()
        out = one(x, x, x, need_weights=False)[0]
        out.square().sum().backward()
        found.append((out.detach(), x.grad))

    def whole(name: str) -> Tensor:
        return torch.cat(
            [split.projections[part].get_parameter(name).grad.full_tensor() for part in ("qk", "v")]
        )

    pairs = [
        *zip(*found, strict=True),
        (attn.in_proj_weight.grad, whole("weight")),
        (attn.in_proj_bias.grad, whole("bias")),
    ]
    names = ("output", "gradient of the input", "gradient of the weights", "gradient of the biases")
    return [
        name
        for name, (wanted, own) in zip(names, pairs, strict=True)
        if not torch.allclose(own, wanted, rtol=1e-4, atol=1e-5)
    ]


@pytest.mark.thorough
def test_split_by_heads_over_two_processes() -> None:
    assert in_two_processes(by_heads) == []
