"""Factorized attention: what its closed forms count, its heads, and its options."""

from __future__ import annotations

import pytest
import torch
from cases import close
from torch.utils._python_dispatch import TorchDispatchMode

import attnzoo
from attnzoo.variants.sparse_transformer import factorized_shares

FORMS = [
    (pattern, factors) for pattern in ("strided", "fixed") for factors in ("merged", "by_head")
]


def built(pattern: str, factors: str) -> attnzoo.Attention:
    return attnzoo.build(
        "sparse_transformer",
        heads=4,
        head_dim=8,
        stride=5,
        expressivity=2,
        pattern=pattern,
        factors=factors,
    )


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("lengths", [(64, 64), (1, 33), (7, 40), (40, 7)], ids=str)
@pytest.mark.parametrize(("pattern", "factors"), FORMS)
def test_the_support_is_the_masks(
    pattern: str, factors: str, lengths: tuple[int, int], is_causal: bool
) -> None:
    attn = built(pattern, factors)
    mask = (
        attn.weights(
            torch.zeros(1, 4, lengths[0], 8), torch.zeros(1, 4, lengths[1], 8), is_causal=is_causal
        )
        > 0
    )
    assert attn.cost(1, *lengths, is_causal=is_causal).support_macs == int(mask.sum()) * 2 * 8


@pytest.mark.parametrize(("pattern", "factors"), FORMS)
def test_heads_are_kept_with_their_factor(pattern: str, factors: str) -> None:
    attn = built(pattern, factors)
    q, k, v = (torch.randn(1, 4, 50, 8, dtype=torch.float64) for _ in "qkv")
    expected = attn(q, k, v, is_causal=True)[:, 1:3]
    attn.keep_heads(1, 2)
    close(attn(q[:, 1:3], k[:, 1:3], v[:, 1:3], is_causal=True), expected, 1e-10, "heads 1 and 2")


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(("pattern", "factors"), FORMS)
def test_calls_of_the_kernel_may_be_cut_anywhere(
    pattern: str, factors: str, is_causal: bool, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call for every row of queries, or column, is what few calls are; both are what products
    over whole rows of keys are."""
    attn, mask = built(pattern, factors), torch.arange(43)[None] % 7 > 0 if padded else None
    q, k, v = (torch.randn(1, 4, 43, 8, dtype=torch.float64, requires_grad=True) for _ in "qkv")

    def run() -> list[torch.Tensor]:
        out = attn(q, k, v, key_mask=mask, is_causal=is_causal)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    whole = run()
    monkeypatch.setattr(factorized_shares, "NUMBERS", 1)
    cut = run()
    attn.backend = "blocks"
    for one, other, open_ in zip(whole, cut, run(), strict=True):
        close(one, other, 1e-12, "cut")
        close(one, open_, 1e-12, "by products")


def test_work_grows_as_n_root_n_when_the_stride_is_the_root() -> None:
    macs = [
        attnzoo.build("sparse_transformer", heads=1, head_dim=8, stride=root)
        .cost(1, root * root, is_causal=True)
        .macs
        for root in (64, 128, 256)
    ]
    # Two rows of keys near each row of queries, but for the first, and a column of keys: 3 √n keys
    # a query.
    assert macs == [2 * 8 * (3 * root**3 - root**2) for root in (64, 128, 256)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "stride=0 must be a whole number"),
        (
            {"stride": 4, "pattern": "fixed", "expressivity": 5},
            "expressivity=5 must be at most stride=4",
        ),
        ({"pattern": "learned"}, "pattern='learned' is unknown"),
        ({"factors": "both"}, "factors='both' is unknown"),
    ],
)
def test_a_bad_option_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attnzoo.build("sparse_transformer", heads=4, head_dim=8, **options)


class _Executed(TorchDispatchMode):
    """Multiply-accumulates of the calls of torch's flash attention."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            q, k, v = args[:3]
            self.macs += q.shape[:3].numel() * k.shape[2] * (q.shape[3] + v.shape[3])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("factors", ["merged", "by_head"])
@pytest.mark.parametrize("pattern", ["strided", "fixed"])
@pytest.mark.parametrize(
    "lengths", [(96, 96), (100, 100), (33, 33), (3, 3), (8, 8), (5, 17), (17, 5), (50, 2)], ids=str
)
def test_the_cost_is_what_the_kernel_executes_and_what_a_trace_counts(
    pattern: str, factors: str, lengths: tuple[int, int]
) -> None:
    """Rows of keys beyond either end are computed by neither, nor a factor that adds nothing to the
    other."""
    options = {"expressivity": 2} if pattern == "fixed" else {}
    attn = attnzoo.build(
        "sparse_transformer",
        heads=4,
        head_dim=16,
        stride=4,
        pattern=pattern,
        factors=factors,
        **options,
    )
    q, k = (torch.randn(2, 4, length, 16) for length in lengths)
    for is_causal in (False, True):
        with _Executed() as executed:
            attn(q, k, k, is_causal=is_causal)
        cost = attn.cost(2, *lengths, is_causal=is_causal).macs
        assert executed.macs == cost == attnzoo.count_flops(attn, q, k, k, is_causal=is_causal).macs
