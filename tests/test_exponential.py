"""The exponential as a power of 2."""

from __future__ import annotations

import pytest
import torch

from attnzoo.engines.exponential import exp_


@pytest.mark.parametrize(
    ("dtype", "near", "far"), [(torch.float32, 6e-7, 5e-6), (torch.float64, 2e-15, 2e-14)]
)
def test_it_is_the_exponential(dtype, near, far):
    x = torch.linspace(-87, 88, 200_001, dtype=dtype)
    wanted = x.double().exp()
    error = (exp_(x.clone()).double() - wanted).abs() / wanted
    assert error[x.abs() <= 10].max() < near and error.max() < far


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_it_keeps_what_is_no_number_and_what_has_no_weight(dtype):
    found = exp_(torch.tensor([float("-inf"), 0.0, float("inf"), float("nan")], dtype=dtype))
    assert found[:3].tolist() == [0.0, 1.0, float("inf")] and found[3].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    x = torch.randn(1000, dtype=dtype)
    assert torch.equal(exp_(x.clone()), x.exp())


def test_its_gradient_is_itself():
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: exp_(x * 2), x) and torch.autograd.gradgradcheck(
        lambda x: exp_(x * 2), x
    )
