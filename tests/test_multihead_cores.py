"""MultiheadAttention runs any core between its projections, translates torch's masks for it, and
refuses what it cannot do."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, usual_cases
from multihead_cases import (
    BATCH,
    CAUSAL_CASES,
    DOUBLE,
    HEADS,
    KEYS,
    SINGLE,
    SIZE,
    as_float,
    options_of,
)
from small import causal_bool
from stages import in_turn
from torch import Tensor, nn

import attnzoo
from attnzoo import MultiheadAttention, UnsupportedError
from attnzoo.layers.input_projections import project_inputs, weighed

MASKLESS_CASES = [case for case in CAUSAL_CASES if not case.spec.attn_mask]


def by_hand(
    module: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, **call: Any
) -> tuple[Tensor, Tensor]:
    """(batch, length, features): the core on q, k and v projected one by one, and its weights."""

    def project(
        x: Tensor,
        i: int,
        packed: Tensor = module.in_proj_weight,
        biases: Tensor = module.in_proj_bias,
    ) -> Tensor:
        weight, bias = (part[i * SIZE : (i + 1) * SIZE] for part in (packed, biases))
        return F.linear(x, weight, bias).unflatten(-1, (HEADS, SIZE // HEADS)).transpose(1, 2)

    q, k, v = (project(x, i) for i, x in enumerate((query, key, value)))
    by_batch = copy.copy(module)
    by_batch.batch_first = True  # as the tensors here are
    given = dict(call)
    call |= project_inputs(by_batch, query, key, k, call)
    k, v = weighed(module, k, v, call, given)
    own: Any = None
    if (packed := getattr(module.attention, "global_projection", None)) is not None:
        assert isinstance(packed, nn.Linear)
        own = tuple(
            project(x, i, packed.weight, packed.bias) for i, x in enumerate((query, key, value))
        )
    out = module.attention(q, k, v, global_qkv=own, **call)
    a = module.attention.weights(q, k, global_qk=own and own[:2], **call)
    return F.linear(out.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias), a


def core(
    case: Case, *, batch_first: bool = True, dtype: torch.dtype = torch.float64, **options: Any
) -> MultiheadAttention:
    torch.manual_seed(2)
    made = MultiheadAttention(
        SIZE, HEADS, batch_first=batch_first, dtype=dtype, **options, **options_of(case)
    )
    nn.init.normal_(made.in_proj_bias)
    nn.init.normal_(made.out_proj.bias)
    if (packed := getattr(made.attention, "global_projection", None)) is not None:
        assert isinstance(packed, nn.Linear)
        nn.init.normal_(packed.weight, std=0.3)
        nn.init.normal_(packed.bias)
    return made


def bool_form(mask: Tensor) -> Tensor:
    return mask


@pytest.mark.parametrize(
    ("case", "batch_first", "padding_form"),
    in_turn(
        usual_cases(),
        [(first, form) for first in (True, False) for form in (as_float, bool_form, None)],
    ),
)
def test_every_core_runs_on_the_projected_inputs(
    case: Case, batch_first: bool, padding_form: Callable[[Tensor], Tensor] | None
) -> None:
    ours = core(case, batch_first=batch_first)
    x, y = (
        torch.randn(BATCH, 21, SIZE, dtype=torch.float64),
        torch.randn(BATCH, 21 if not case.spec.cross else 30, SIZE, dtype=torch.float64),
    )
    inputs = {"self": (x, x, x), "cross": (x, y, y), "three": (x, y, y + 1)}
    for (query, key, value), is_causal in itertools.product(inputs.values(), (False, True)):
        if not (case.spec.causal if is_causal else case.spec.bidirectional):
            continue
        padding = torch.zeros(key.shape[:2], dtype=torch.bool)
        padding[0, 17:] = padding[1, 4] = True
        key_mask = None if padding_form is None else ~padding
        expected, expected_weights = by_hand(
            ours, query, key, value, key_mask=key_mask, is_causal=is_causal
        )
        masked = None if padding_form is None else padding_form(padding)
        arguments = (
            (query, key, value)
            if batch_first
            else tuple(z.transpose(0, 1) for z in (query, key, value))
        )
        if query is key:
            arguments = (arguments[0],) * 3
        out, weights = ours(
            *arguments, key_padding_mask=masked, is_causal=is_causal, average_attn_weights=False
        )
        torch.testing.assert_close(out if batch_first else out.transpose(0, 1), expected, **DOUBLE)
        torch.testing.assert_close(weights, expected_weights, **DOUBLE)
        single = ours(
            query[0],
            key[0],
            value[0],
            key_padding_mask=None if masked is None else masked[0],
            is_causal=is_causal,
        )
        if padding_form is not None:
            torch.testing.assert_close(single[0], expected[0], **DOUBLE)
            torch.testing.assert_close(single[1], expected_weights[0].mean(0), **DOUBLE)


@pytest.mark.parametrize("case", CAUSAL_CASES, ids=str)
def test_the_causal_mask_in_every_form_is_causality(case: Case) -> None:
    ours = core(case)
    x = torch.randn(BATCH, 9, SIZE, dtype=torch.float64)
    expected = ours(x, x, x, is_causal=True, need_weights=False)[0]
    flat = causal_bool(9)
    each = flat.expand(BATCH * HEADS, 9, 9)
    for mask, hint in itertools.product(
        (flat, as_float(flat), as_float(flat, torch.float32), each, as_float(each)), (False, True)
    ):
        assert torch.equal(
            ours(x, x, x, attn_mask=mask, is_causal=hint, need_weights=False)[0], expected
        )
    assert torch.equal(
        ours(x[0], x[0], x[0], attn_mask=flat, need_weights=False)[0],
        ours(x[:1], x[:1], x[:1], is_causal=True)[0][0],
    )


@pytest.mark.parametrize("case", MASKLESS_CASES, ids=str)
def test_any_other_mask_is_refused_where_the_core_has_none(case: Case) -> None:
    ours = core(case)
    x = torch.randn(BATCH, 9, SIZE, dtype=torch.float64)
    others = [
        causal_bool(9).T,
        causal_bool(9) | (torch.rand(9, 9) < 0.5),
        torch.randn(9, 9),
    ]
    for mask, hint in itertools.product(others, (False, True)):
        with pytest.raises(UnsupportedError, match=f"{case.variant} cannot apply an attn_mask"):
            ours(x, x, x, attn_mask=mask, is_causal=hint)
    with pytest.raises(
        UnsupportedError, match=f"{case.variant} cannot add a float key_padding_mask"
    ):
        ours(x, x, x, key_padding_mask=torch.randn(BATCH, 9))


@pytest.mark.parametrize("case", MASKLESS_CASES, ids=str)
def test_a_mask_that_hides_nothing_is_none(case: Case) -> None:
    ours = core(case)
    x = torch.randn(BATCH, 9, SIZE, dtype=torch.float64)
    nothing = torch.zeros(9, 9, dtype=torch.bool)
    for hint in (False, True):
        if case.spec.causal if hint else case.spec.bidirectional:
            found = ours(x, x, x, attn_mask=nothing, is_causal=hint)[0]
            assert torch.equal(found, ours(x, x, x, is_causal=hint)[0])


@pytest.mark.parametrize("case", [case for case in usual_cases() if not case.spec.causal], ids=str)
def test_a_causal_mask_is_refused_where_the_core_cannot_be_causal(case: Case) -> None:
    x = torch.randn(BATCH, 9, SIZE, dtype=torch.float64)
    for call in (
        {"is_causal": True},
        {"attn_mask": causal_bool(9)},
        {"attn_mask": as_float(causal_bool(9)), "is_causal": True},
    ):
        with pytest.raises(UnsupportedError, match=f"{case.variant} cannot be causal"):
            core(case)(x, x, x, **call)


@pytest.mark.parametrize("padding_form", [lambda m: m, as_float], ids=["bool", "float"])
@pytest.mark.parametrize("case", usual_cases(), ids=str)
def test_what_stands_in_padding_reaches_no_real_row(
    case: Case, padding_form: Callable[[Tensor], Tensor]
) -> None:
    ours = core(case, dtype=torch.float32)
    x = torch.randn(BATCH, 9, SIZE)
    padding = torch.zeros(BATCH, 9, dtype=torch.bool)
    padding[:, 6:] = True
    poisoned = x.masked_fill(padding[..., None], float("nan"))
    call = {
        "key_padding_mask": padding_form(padding),
        "need_weights": False,
        "is_causal": not case.spec.bidirectional,
    }
    assert torch.equal(
        ours(x, x, x, **call)[0][:, :6], ours(x, poisoned, poisoned, **call)[0][:, :6]
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"embed_dim": 10}, ValueError, "embed_dim=10 must be a multiple of num_heads=3"),
        ({"num_heads": 0}, ValueError, "num_heads=0"),
        ({"attention": "standart"}, ValueError, "did you mean 'standard'"),
        ({"attention_options": {"widow": 3}}, ValueError, "no option 'widow'"),
        ({"attention_options": {"heads": 3}}, ValueError, "must not set 'heads'"),
        ({"attention_options": {"dropout": 0.1}}, ValueError, "must not set 'dropout'"),
        ({"dropout": 1.5}, ValueError, "dropout=1.5"),
        (
            {"attention": "linear", "dropout": 0.1},
            UnsupportedError,
            "linear never forms; build with dropout=0.0",
        ),
        ({"attention": "linear", "add_bias_kv": True}, UnsupportedError, "linear cannot place"),
        ({"attention": "linear", "add_zero_attn": True}, UnsupportedError, "linear cannot place"),
    ],
)
def test_a_wrong_constructor_argument_is_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        MultiheadAttention(**{"embed_dim": SIZE, "num_heads": HEADS, **options})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": torch.zeros(KEYS, SIZE)}, "key has shape .* all be batched"),
        ({"query": torch.zeros(1, KEYS, BATCH, SIZE)}, "query has shape .* all be batched"),
        ({"query": torch.zeros(KEYS, BATCH, 5)}, "query has 5 features .* built for 12"),
        ({"key": torch.zeros(KEYS, BATCH, 5)}, "key has 5 features"),
        (
            {"query": torch.zeros(KEYS, 4, SIZE)},
            "batch sizes must agree in .* since batch_first=False",
        ),
        ({"value": torch.zeros(KEYS + 1, BATCH, SIZE)}, "all but the features must agree"),
        (
            {"query": torch.zeros(KEYS, BATCH, SIZE, dtype=torch.float64)},
            "query has dtype torch.float64 and the module torch.float32",
        ),
        (
            {"query": torch.zeros(KEYS, BATCH, SIZE, dtype=torch.int64)},
            "query has dtype torch.int64",
        ),
        ({"query": torch.zeros(KEYS, BATCH, SIZE, device="meta")}, "query is on meta"),
        (
            {"key_padding_mask": torch.zeros(KEYS, BATCH).bool()},
            r"key_padding_mask has shape \(7, 2\); it must be \(2, 7\)",
        ),
        (
            {"key_padding_mask": torch.zeros(BATCH, KEYS).int()},
            "key_padding_mask has dtype torch.int32",
        ),
        (
            {"attn_mask": torch.zeros(KEYS, KEYS + 1)},
            r"attn_mask has shape \(7, 8\); it must be \(7, 7\) or \(6, 7, 7\)",
        ),
        ({"attn_mask": torch.zeros(KEYS, KEYS).long()}, "attn_mask has dtype torch.int64"),
        ({"attn_mask": torch.zeros(BATCH, KEYS, KEYS)}, "attn_mask has shape"),
        ({"attn_mask": torch.zeros(KEYS, KEYS, device="meta")}, "attn_mask is on meta"),
    ],
)
def test_a_wrong_input_is_named(changed: dict[str, Tensor], message: str) -> None:
    x = torch.zeros(KEYS, BATCH, SIZE)
    with pytest.raises(ValueError, match=message):
        MultiheadAttention(SIZE, HEADS)(**{"query": x, "key": x, "value": x, **changed})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_come_back_nested() -> None:
    ours = MultiheadAttention(SIZE, HEADS, batch_first=True)
    rows = [torch.randn(n, SIZE) for n in (5, 2)]
    x = torch.nested.as_nested_tensor(rows)
    out, _ = ours(x, x, x, need_weights=False)
    for row, found in zip(rows, out.unbind(), strict=True):
        torch.testing.assert_close(found, ours(row, row, row, need_weights=False)[0], **SINGLE)
    with pytest.raises(ValueError, match="nested tensor must be query, key and value"):
        ours(x, x, x, attn_mask=torch.zeros(5, 5))


def test_it_is_in_the_package() -> None:
    assert attnzoo.MultiheadAttention is MultiheadAttention
    assert issubclass(MultiheadAttention, nn.MultiheadAttention)
