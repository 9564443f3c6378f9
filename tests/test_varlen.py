"""The backend `varlen`, whose kernel is torch's for CUDA: what it is asked for, in a kernel of
plain products that takes the same arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import close
from torch import Tensor

import attnzoo
from attnzoo import UnsupportedError
from attnzoo.call import Call
from attnzoo.engines.softmax import varlen
from attnzoo.oracles import ORACLES

asked: list[dict[str, Any]] = []


def plain_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """torch's `varlen_attn` as its documentation has it: (tokens, heads, head_dim), pieces between
    neighbours of cu_seq, (left, right) keys beside each query, -1 for all."""
    assert query.shape == key.shape == value.shape and cu_seq_q.dtype == torch.int32
    asked.append({"ends": cu_seq_q.tolist(), "longest": max_q, "window": window_size})
    assert max_q == max_k == int(cu_seq_q.diff().max()) and torch.equal(cu_seq_q, cu_seq_k)
    rows = []
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if window_size == (-1, 0):
            hidden = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        rows.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(rows)


@pytest.fixture
def on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend takes calls on a CPU and in float64."""
    asked.clear()
    monkeypatch.setattr(varlen, "_kernel", lambda: plain_kernel)
    backends = attnzoo.build("standard", 2, 8).engine.backends
    (own,) = (one for one in backends if one.name == "varlen")
    monkeypatch.setitem(vars(own), "why_not", lambda engine, call: None)


@pytest.mark.usefixtures("on_this_machine")
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_rows_are_taken_whole(is_causal: bool) -> None:
    attn = attnzoo.build("standard", 4, 8, scale=0.3, backend="varlen")
    q = torch.randn(2, 4, 11, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, 11, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ids = torch.tensor([[0] * 4 + [1] * 7, [3] * 1 + [5] * 2 + [0] * 8])
    out = attn(q, k, v, segments=ids, is_causal=is_causal)
    assert attn.last_backend == "varlen"
    assert asked == [
        {"ends": [0, 4, 11, 12, 14, 22], "longest": 8, "window": (-1, 0 if is_causal else -1)}
    ]
    wanted, _ = ORACLES["standard"](q, k, v, segments=ids, is_causal=is_causal, scale=0.3)
    close(out, wanted, 1e-12, "rows")
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), upstream)
    for one, other in zip(found, torch.autograd.grad(wanted, (q, k, v), upstream), strict=True):
        close(one, other, 1e-12, "gradients")


@pytest.mark.usefixtures("on_this_machine")
def test_samples_and_scattered_pieces() -> None:
    """Samples are pieces where nothing is packed; a piece that stops and goes on is brought
    together first."""
    attn = attnzoo.build("standard", 2, 8, backend="varlen").double()
    q, k, v = (torch.randn(3, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    close(attn(q, k, v), ORACLES["standard"](q, k, v)[0], 1e-12, "samples")
    assert asked.pop()["ends"] == [0, 5, 10, 15]
    ids = torch.tensor([[0, 1, 1, 0, 0]]).expand(3, -1)
    wanted = ORACLES["standard"](q, k, v, segments=ids, is_causal=True)[0]
    close(attn(q, k, v, segments=ids, is_causal=True), wanted, 1e-12, "scattered")


def test_it_says_why_it_refuses() -> None:
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(UnsupportedError, match=r"varlen.* needs tensors on a CUDA device, got cpu"):
        attnzoo.build("standard", 2, 8, backend="varlen")(q, q, q)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "no torch.float32 kernel"),
        ({"key_mask": True}, "leave a key_mask or attn_mask to sdpa"),
        ({"softcap": 2.0}, "a softcap: leave them to sdpa"),
        ({"dropout": 0.1}, "leave dropout to sdpa"),
        ({"queries": 4}, "as many queries as keys, got 4 and 5"),
        ({"head_dim": 12}, "head_dim=12 and value_dim=12 must be one multiple of 8"),
    ],
)
def test_static_reasons(change: dict[str, Any], reason: str, monkeypatch: Any) -> None:
    """Asked of tensors that say they are on a GPU."""
    width, queries = change.get("head_dim", 16), change.get("queries", 5)
    options = {name: change[name] for name in ("softcap", "dropout") if name in change}
    attn = attnzoo.build("standard", 2, width, **options)
    q, k = (
        torch.empty(1, 2, n, width, dtype=change.get("dtype", torch.bfloat16)) for n in (queries, 5)
    )
    mask = torch.ones(1, 5, dtype=torch.bool) if "key_mask" in change else None
    call = Call(q, k, k, mask, None, False, {}, attn.spec.inputs, None)

    class OnGpu:
        type = "cuda"

    class Told:
        device = OnGpu()
        dtype, shape = q.dtype, q.shape

    found = varlen.why_not(attn.engine, _Asked(call, Told()))  # pyright: ignore[reportArgumentType]
    assert found is not None and reason in found


class _Asked:
    """A call whose queries say that they are elsewhere."""

    def __init__(self, call: Call, q: Any) -> None:
        self.call, self.q = call, q

    def __getattr__(self, name: str) -> Any:
        return getattr(self.call, name)
