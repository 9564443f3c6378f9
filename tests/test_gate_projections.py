"""What a layer makes gates with: the papers' equations by hand, and where they begin."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import close
from torch import Tensor

import attnzoo
from attnzoo.layers.input_projections import project_inputs

HEADS = 4


def layer_with(name: str, features: int = 32, **options: Any) -> Any:
    """In float64, with its gates moved away from where they begin."""
    torch.manual_seed(0)
    layer = attnzoo.MultiheadAttention(
        features, HEADS, batch_first=True, attention=name, attention_options=options
    )
    with torch.no_grad():
        for parameter in layer.attention.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return layer.double()


def test_gates_are_made_as_the_papers_make_them() -> None:
    """Of x, by hand: heads one behind the other, each with its rate."""
    x, width = torch.randn(2, 5, 32).double(), 32 // HEADS
    softplus, sigmoid = F.softplus, torch.sigmoid

    def made(name: str, **options: Any) -> tuple[Any, dict[str, Tensor]]:
        layer = layer_with(name, **options)
        keys = x.unflatten(2, (HEADS, width)).transpose(1, 2)
        return layer.attention.input_projections, project_inputs(layer, x, x, keys, ())

    for name in ("mamba2", "gated_deltanet", "log_linear"):
        parts, found = made(name)
        gate = parts.log_decay
        wanted = -gate.A_log.exp() * softplus(x @ gate.out.weight.T + gate.dt_bias)
        close(found["log_decay"], wanted.transpose(1, 2), 1e-12, f"{name}'s decay")
    for name in ("deltanet", "gated_deltanet", "kda"):
        for most in (1, 2):
            parts, found = made(name, allow_neg_eigval=most == 2)
            wanted = most * sigmoid(x @ parts.beta.out.weight.T)
            close(found["beta"], wanted.transpose(1, 2), 1e-12, f"{name}'s beta")
    for bound in (None, -5.0):
        parts, found = made("kda", lower_bound=bound)
        gate = parts.log_decay
        raw = x @ gate.low.weight.T @ gate.out.weight.T + gate.dt_bias
        rate = gate.A_log.exp()[:, None]
        raw = raw.unflatten(2, (HEADS, width))
        wanted = -rate * softplus(raw) if bound is None else bound * sigmoid(rate * raw)
        close(found["log_decay"], wanted.transpose(1, 2), 1e-12, f"kda, {bound}")
    parts, found = made("gla")
    gate = parts.log_decay
    raw = x @ gate.low.weight.T @ gate.out.weight.T + gate.out.bias
    wanted = sigmoid(raw).pow(1 / 16).log().unflatten(2, (HEADS, width))
    close(found["log_decay"], wanted.transpose(1, 2), 1e-12, "gla")
    parts, found = made("rwkv7")
    gate = parts.log_decay
    raw = (x @ gate.low.weight.T).tanh() @ gate.out.weight.T + gate.out.bias
    wanted = -math.exp(-0.5) * sigmoid(raw).unflatten(2, (HEADS, width))
    close(found["log_decay"], wanted.transpose(1, 2), 1e-12, "rwkv7's decay")
    gate = parts.removal_rate
    raw = x @ gate.low.weight.T @ gate.out.weight.T + gate.out.bias
    wanted = sigmoid(raw).unflatten(2, (HEADS, width))
    close(found["removal_rate"], wanted.transpose(1, 2), 1e-12, "rwkv7's rate")
    scaled = (x * parts.removal_key.scale).unflatten(2, (HEADS, width)).transpose(1, 2)
    wanted = scaled / scaled.square().sum(-1, keepdim=True).sqrt()
    close(found["removal_key"], wanted, 1e-12, "rwkv7's removal key")


def test_gates_begin_where_the_papers_begin() -> None:
    torch.manual_seed(0)
    for name, options in (("gated_deltanet", {}), ("kda", {}), ("kda", {"lower_bound": -5.0})):
        layer = attnzoo.MultiheadAttention(
            64, 16, attention=name, attention_options=options, dtype=torch.float64
        )
        parts: Any = layer.attention.input_projections
        with torch.no_grad():
            for parameter in parts.log_decay.parameters():
                parameter.fill_(9.0)
        torch.manual_seed(1)
        parts.log_decay.reset_parameters()
        steps, rates = F.softplus(parts.log_decay.dt_bias), parts.log_decay.A_log.exp()
        torch.manual_seed(1)
        drawn = torch.ones_like(rates) if options else torch.empty_like(rates).uniform_(1, 16)
        close(rates, drawn, 1e-12, "A")
        logs = torch.empty_like(steps).uniform_(math.log(1e-3), math.log(1e-1))
        close(steps / logs.exp(), torch.ones_like(steps), 1e-12, "steps")
    rwkv: Any = attnzoo.MultiheadAttention(64, 16, attention="rwkv7").attention
    out = rwkv.input_projections.log_decay(torch.randn(3, 64))
    assert bool((out == out[:1]).all()) and -0.01 < out[0, 0] < 0 and out[0, -1] < -0.37


def test_mamba2s_values_are_weighed_by_its_steps() -> None:
    """Which a decay that the call brings does not tell."""
    layer, x = layer_with("mamba2"), torch.randn(2, 5, 32).double()
    gate, how = layer.attention.input_projections.log_decay, {"is_causal": True}
    q, k, v = (
        one.unflatten(2, (HEADS, -1)).transpose(1, 2)
        for one in (x @ layer.in_proj_weight.T).chunk(3, 2)
    )
    steps = F.softplus(x @ gate.out.weight.T + gate.dt_bias).transpose(1, 2)
    log_decay = -gate.A_log.exp()[:, None] * steps
    for values, given in ((v * steps[..., None], {}), (v, {"log_decay": log_decay})):
        rows = layer.attention(q, k, values, log_decay=log_decay, **how)
        wanted = layer.out_proj(rows.transpose(1, 2).flatten(2))
        close(layer(x, x, x, **how, **given)[0], wanted, 1e-12, f"{list(given)}")


def test_options_of_a_layers_gates_are_checked() -> None:
    for name in ("deltanet", "gated_deltanet", "kda"):
        with pytest.raises(ValueError, match="allow_neg_eigval=1 must be True or False"):
            attnzoo.build(name, 2, 4, allow_neg_eigval=1)
    for bound in (0.0, 5.0, -math.inf):
        with pytest.raises(ValueError, match=r"lower_bound=.* must be below 0"):
            attnzoo.build("kda", 2, 4, lower_bound=bound)
