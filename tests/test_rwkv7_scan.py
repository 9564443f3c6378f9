"""RWKV-7's scan in the spelling of the `rwkv` package: its loop, and its whole time mixing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.conventions.rwkv7_scan import rwkv7_scan

HEADS, WIDTH, LENGTH = 2, 4, 11
SIZE = HEADS * WIDTH
CLOSE: Any = {"rtol": 1e-10, "atol": 1e-10}


def loop(given: list[Tensor], state: Tensor) -> Any:
    """The package's, token by token, of one sample.

    given: r, w, k, v, kk and a, (length, SIZE) each. state: (heads, V, K)
    """
    rows = []
    for t in range(LENGTH):
        r_t, w_t, k_t, v_t, kk_t, a_t = (x[t].view(HEADS, WIDTH) for x in given)
        removed = state @ -kk_t[:, :, None] @ (kk_t * a_t)[:, None]
        state = state * w_t[:, None] + removed + v_t[:, :, None] @ k_t[:, None]
        rows.append((state @ r_t[:, :, None]).reshape(SIZE))
    return torch.stack(rows), state


def drawn() -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    r, k, v = (torch.randn(2, LENGTH, SIZE).double() for _ in range(3))
    w = torch.exp(-0.606531 * torch.rand(2, LENGTH, SIZE).double())
    kk = F.normalize(torch.randn(2, LENGTH, HEADS, WIDTH).double(), dim=-1).flatten(2)
    a = torch.rand(2, LENGTH, SIZE).double()
    given = [x.requires_grad_() for x in (r, w, k, v, kk, a)]
    return given, torch.randn(2, HEADS, WIDTH, WIDTH).double().requires_grad_()


@pytest.mark.parametrize("begun", [False, True])
def test_equals_the_loop(begun: bool) -> None:
    """Rows, the state, and gradients."""
    given, state = drawn()
    start = state if begun else torch.zeros_like(state)
    each = [loop([x[b] for x in given], start[b]) for b in range(2)]
    wanted = [torch.stack(parts) for parts in zip(*each, strict=True)]
    by_head = [x.unflatten(2, (HEADS, WIDTH)) for x in given]
    out, after = rwkv7_scan(
        *by_head, initial_state=state if begun else None, output_final_state=True
    )
    assert after is not None
    found = [out.flatten(2), after]
    upstream = [torch.randn_like(x) for x in wanted]
    leaves = [*given, state] if begun else given
    expected = torch.autograd.grad(wanted, leaves, upstream)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    for one, other in zip(torch.autograd.grad(found, leaves, upstream), expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_padding_and_pieces() -> None:
    given, _ = drawn()
    by_head = [x.detach().unflatten(2, (HEADS, WIDTH)) for x in given]
    wanted, state = rwkv7_scan(*by_head, output_final_state=True)
    padded = [F.pad(x, (0, 0, 0, 0, 3, 0), value=0.5) for x in by_head]
    real = (torch.arange(LENGTH + 3) >= 3).expand(2, -1)
    out, after = rwkv7_scan(*padded, output_final_state=True, key_mask=real)
    torch.testing.assert_close([out[:, 3:], after], [wanted, state], **CLOSE)
    ids = (torch.arange(LENGTH) >= 5).long().expand(2, -1)
    out, _ = rwkv7_scan(*by_head, segments=ids)
    apart = [rwkv7_scan(*(x[:, part] for x in by_head))[0] for part in (slice(5), slice(5, None))]
    torch.testing.assert_close(out, torch.cat(apart, 1), **CLOSE)
