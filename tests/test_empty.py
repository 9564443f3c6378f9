"""Empty batches and empty lengths give empty answers (rule 3): forward, backward, weights, decoding
and the layer."""

from __future__ import annotations

import pytest
import torch
from cases import Case, Situation, ask_oracle, backends_of, can, cases, tensors, usual_cases
from small import layer_masks, small
from stages import only

import attnzoo

ALL = pytest.mark.parametrize("case", only(usual_cases(), cases()))
NOTHING = [
    Situation(5, 5, batch=0),
    Situation(80, 80, batch=0),
    Situation(0, 0),
    Situation(0, 0, batch=0),
]
CROSS = [Situation(0, 5), Situation(5, 0), Situation(5, 9, batch=0), Situation(9, 5, batch=0)]


@ALL
def test_forward_and_backward(case: Case) -> None:
    for backend in backends_of(case):
        attn = case.build(prefer=backend)
        for situation in [*NOTHING, *(CROSS if case.spec.cross else [])]:
            for is_causal in (causal for causal in (False, True) if can(case.spec, causal)):
                for masked in (False, True):
                    q, k, v = (x.float().requires_grad_() for x in tensors(situation)[:3])
                    mask = (
                        torch.ones(situation.batch, situation.key_length, dtype=torch.bool)
                        if masked
                        else None
                    )
                    out = attn(q, k, v, key_mask=mask, is_causal=is_causal)
                    assert out.shape == q.shape and not out.any()
                    weights = attn.weights(q, k, key_mask=mask, is_causal=is_causal)
                    assert weights.shape == (*q.shape[:3], situation.key_length)
                    if out.requires_grad:
                        out.sum().backward()
                        assert all(
                            x.grad is None or not x.grad.any()
                            for x in (q, k, v, *attn.parameters())
                        )


@pytest.mark.parametrize("case", [case for case in cases() if case.spec.decodes], ids=str)
@pytest.mark.parametrize(("batch", "tokens"), [(2, 0), (2, 3)])
def test_a_step_of_nothing_leaves_the_state(case: Case, batch: int, tokens: int) -> None:
    attn = case.build(dtype=torch.float64)
    q, k, v, _ = tensors(Situation(tokens + 4, tokens + 4, batch=batch), shift=case.shift)
    state = attn.init_state(batch, kv_heads=2, dtype=q.dtype)
    _, state = attn.step(q[:, :, :tokens], k[:, :, :tokens], v[:, :, :tokens], state)
    out, same = attn.step(q[:, :, :0], k[:, :, :0], v[:, :, :0], state)
    assert out.shape == (batch, 4, 0, 8)
    rest, _ = attn.step(q[:, :, tokens:], k[:, :, tokens:], v[:, :, tokens:], same)
    assert torch.allclose(rest, attn(q, k, v, is_causal=True)[:, :, tokens:], atol=1e-9)


@pytest.mark.parametrize("name", attnzoo.names())
@pytest.mark.parametrize("shape", [(0, 6, 16), (2, 0, 16), (0, 0, 16)], ids=str)
def test_the_layer(name: str, shape: tuple[int, ...]) -> None:
    layer = attnzoo.MultiheadAttention(
        16, 2, batch_first=True, attention=name, attention_options=small(name)
    )
    masks = layer_masks(attnzoo.describe(name).spec, shape[1])
    x = torch.randn(shape, requires_grad=True)
    mask = masks.get("src_mask")
    for need_weights in (False, True):
        out, _ = layer(
            x, x, x, attn_mask=mask, is_causal=mask is not None, need_weights=need_weights
        )
        assert out.shape == shape
        out.sum().backward()


@ALL
def test_the_oracle(case: Case) -> None:
    attn = case.build()
    for situation in [*NOTHING, *(CROSS if case.spec.cross else [])]:
        q, k, v = (x.requires_grad_() for x in tensors(situation)[:3])
        out, a = ask_oracle(attn, q, k, v, options=case.options, is_causal=case.spec.forms[0])
        assert out.shape == (*q.shape[:3], v.shape[3]) and not out.any()
        assert a.shape == (*q.shape[:3], k.shape[2]) and not a.any()
        out.sum().backward()
        assert all(x.grad is not None and not x.grad.any() for x in (q, k, v))
