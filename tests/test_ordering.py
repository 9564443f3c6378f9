"""Orders and maxima as an exported graph computes them, against torch's own."""

from __future__ import annotations

import pytest
import torch

from attnzoo.sequences.ordering import running_maximum, search, stable_order, true_first

LENGTHS = pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 64, 65])


@pytest.fixture(params=[False, True], ids=["eager", "exporting"])
def exporting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: request.param)


@LENGTHS
@pytest.mark.usefixtures("exporting")
def test_running_maximum(length: int) -> None:
    for x in (
        torch.randn(2, 3, length),
        torch.randint(0, 9, (2, 3, length)),
        torch.full((1, 1, length), float("-inf")),
    ):
        assert torch.equal(running_maximum(x), x.cummax(-1).values)


@LENGTHS
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.usefixtures("exporting")
def test_search(length: int, right: bool) -> None:
    ordered, wanted = (
        torch.randint(0, 2 * length, (2, 3, length)).sort(-1).values,
        torch.randint(-1, 2 * length + 1, (2, 3, 11)),
    )
    ordered[0, 0, length // 2 :] = 2**60
    assert torch.equal(
        search(ordered, wanted, right=right), torch.searchsorted(ordered, wanted, right=right)
    )


@LENGTHS
def test_orders_are_stable(length: int) -> None:
    x = torch.randint(0, 3, (2, 3, length)) * 10**9
    x[0, 0, ::2] = 2**60
    assert torch.equal(stable_order(x), x.argsort(dim=-1, stable=True))
    mask = torch.rand(4, length) < 0.5
    assert torch.equal(
        true_first(mask, length), (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    )
    assert torch.equal(true_first(mask, length // 2), true_first(mask, length)[:, : length // 2])
