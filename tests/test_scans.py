"""Recurrences of transformers that a variant is once each channel is a head: the first Mamba's scan
(Mamba, Falcon Mamba, Jamba) as `gla`, and RWKV-4's WKV as `standard` with a bias by distance."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo

BATCH, CHANNELS, STATES, LENGTH = 2, 5, 4, 37


def of_transformers(module: str, name: str) -> Any:
    pytest.importorskip("transformers")
    path = f"transformers.models.{module}.modeling_{module}"
    return getattr(importlib.import_module(path), name)


@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_a_selective_scan_is_gla(family: str) -> None:
    """Rows, gradients, and the state: a decay for every channel and state, keys Δ B, queries C."""
    scan = of_transformers(family, "mamba_selective_scan")
    torch.manual_seed(0)
    u = torch.randn(BATCH, CHANNELS, LENGTH, requires_grad=True)
    delta = torch.rand(BATCH, CHANNELS, LENGTH, requires_grad=True)
    rates = (-4 * torch.rand(CHANNELS, STATES)).requires_grad_()
    b, c = (torch.randn(BATCH, STATES, LENGTH, requires_grad=True) for _ in "bc")
    wanted, after = scan(u, delta, rates, b, c, return_last_state=True)
    attn = attnzoo.build("gla", heads=CHANNELS, head_dim=STATES, scale=1.0)
    q = c.transpose(1, 2)[:, None].expand(-1, CHANNELS, -1, -1)
    k = b.transpose(1, 2)[:, None] * delta[..., None]
    log_decay = delta[..., None] * rates[:, None]
    rows = attn(q, k, u[..., None], log_decay=log_decay, is_causal=True)[..., 0]
    torch.testing.assert_close(rows, wanted, rtol=1e-5, atol=1e-5)
    leaves, upstream = [u, delta, rates, b, c], torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, leaves, upstream, retain_graph=True)
    found = torch.autograd.grad(rows, leaves, upstream, retain_graph=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    state, parts = attn.init_state(BATCH), []
    with torch.no_grad():
        for start, end in ((0, 20), (20, 21), (21, LENGTH)):
            tokens = slice(start, end)
            new_q, new_k, new_v = (x[:, :, tokens] for x in (q, k, u[..., None]))
            gates = log_decay[:, :, tokens]
            out, state = attn.step(new_q, new_k, new_v, state, log_decay=gates)
            parts.append(out[..., 0])
    torch.testing.assert_close(torch.cat(parts, 2), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.past.sums[..., 0], after, rtol=1e-5, atol=1e-5)


def bias_of(decay: Tensor, own: Tensor, length: int) -> Tensor:
    """(channels, 2 · length − 1): `own` for a token itself, and (d − 1) w for d tokens before."""
    distance = torch.arange(1, length)
    before = (distance - 1) * decay[:, None]
    return torch.cat([before.flip(1), own[:, None], torch.zeros_like(before)], 1)


def test_rwkv_4_is_softmax_by_distance() -> None:
    """Rows and gradients, and steps behind each other: one key of width 1 a channel, its logarithm
    fading by w a token, and a bonus for the own token."""
    wkv = of_transformers("rwkv", "rwkv_linear_attention_cpu")
    torch.manual_seed(0)
    decay, own = (torch.randn(CHANNELS, requires_grad=True) for _ in "wu")
    k, v = (torch.randn(BATCH, LENGTH, CHANNELS, requires_grad=True) for _ in "kv")
    wanted, _ = wkv(decay, own, k, v)
    attn = attnzoo.build("standard", heads=CHANNELS, head_dim=1, scale=1.0)
    bias = bias_of(-decay.exp(), own, LENGTH)
    keys, values = (x.transpose(1, 2)[..., None] for x in (k, v))
    queries = torch.ones_like(keys)
    rows = attn(queries, keys, values, distance_bias=bias, is_causal=True)[..., 0].transpose(1, 2)
    torch.testing.assert_close(rows, wanted, rtol=1e-5, atol=1e-5)
    leaves, upstream = [decay, own, k, v], torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, leaves, upstream)
    found = torch.autograd.grad(rows, leaves, upstream)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    theirs, state = None, attn.init_state(BATCH)
    with torch.no_grad():
        for start, end in ((0, 20), (20, 21), (21, LENGTH)):
            wanted, theirs = wkv(
                decay, own, k[:, start:end], v[:, start:end], state=theirs, return_state=True
            )
            q, new_k, new_v = (x[:, :, start:end] for x in (queries, keys, values))
            out, state = attn.step(q, new_k, new_v, state, distance_bias=bias)
            torch.testing.assert_close(out[..., 0].transpose(1, 2), wanted, rtol=1e-5, atol=1e-5)
