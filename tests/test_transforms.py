"""Every variant under torch.func: vmap is a batch of calls, grad is autograd's gradient."""

from __future__ import annotations

import pytest
import torch
from cases import Case, Situation, can, close, tensors, usual_cases
from torch import Tensor

RUNS = [(case, is_causal) for case in usual_cases() for is_causal in (False, True) if can(case.spec, is_causal)]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("case", "is_causal"), [pytest.param(c, i, id=f"{c}-{'causal' if i else 'full'}") for c, i in RUNS])
def test_vmap_and_grad_see_into_the_engine(case: Case, is_causal: bool) -> None:
    attn = case.build(dtype=torch.float64)
    q, k, v, upstream = tensors(Situation(150, 150), shift=case.shift)
    some = torch.stack([q, q.flip(2), 2 * q])

    def out(q: Tensor) -> Tensor:
        return attn(q, k, v, is_causal=is_causal)

    def total(q: Tensor) -> Tensor:
        return (out(q) * upstream).sum() + 0.0 * q.sum()  # what looks at no query has a gradient too: 0

    one = some[1].clone().requires_grad_()
    expected = torch.autograd.grad(total(one), one)[0]
    close(torch.func.vmap(out)(some), torch.stack([out(q) for q in some]), 1e-12, "vmap")
    close(torch.func.grad(total)(some[1]), expected, 1e-10, "grad")
    close(torch.func.vmap(torch.func.grad(total))(some)[1], expected, 1e-10, "vmap of grad")
