"""MultiheadAttention with the standard core is torch.nn.MultiheadAttention: numbers, gradients,
weights, state_dict, initialisation."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Case, usual_cases
from multihead_cases import (
    BATCH,
    DOUBLE,
    HEADS,
    KEYS,
    QUERIES,
    SINGLE,
    SIZE,
    as_float,
    options_of,
    pair,
)
from small import causal_bool, layer_masks, possible
from stages import in_turn
from torch import Tensor, nn

from attnzoo import MultiheadAttention


def gradients(
    module: nn.Module, inputs: list[Tensor], outputs: tuple[Tensor, Tensor | None]
) -> list[Tensor]:
    """Of a fixed random functional of all outputs, by every parameter and input."""
    generator = torch.Generator().manual_seed(5)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum()
        for x in outputs
        if x is not None
    )
    assert isinstance(loss, Tensor)
    parameters = list({id(x): x for x in [*module.parameters(), *inputs]}.values())
    return [
        x if x is not None else torch.zeros(())
        for x in torch.autograd.grad(loss, parameters, allow_unused=True)
    ]


def assert_same(
    theirs: nn.MultiheadAttention,
    ours: MultiheadAttention,
    inputs: list[Tensor],
    tolerance: dict[str, Any],
    **call: Any,
) -> None:
    expected, found = theirs(*inputs, **call), ours(*inputs, **call)
    assert (expected[1] is None) == (found[1] is None)
    for x, y in zip(expected, found, strict=True):
        if x is not None:
            torch.testing.assert_close(y, x, **tolerance)
    for x, y in zip(
        gradients(theirs, inputs, expected), gradients(ours, inputs, found), strict=True
    ):
        torch.testing.assert_close(y, x, **tolerance)


def masks(queries: int, keys: int) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Padding and attention masks in every form that torch takes, such that every query sees a
    key."""
    padding = torch.zeros(BATCH, keys, dtype=torch.bool)
    padding[0, -2:] = padding[1, 1] = True
    flat = torch.rand(queries, keys) < 0.4
    each = torch.rand(BATCH * HEADS, queries, keys) < 0.4
    flat[:, 0] = each[..., 0] = False
    bias = torch.randn(queries, keys, dtype=torch.float64).masked_fill(flat, float("-inf"))
    yield from itertools.product((None, padding), (None, flat, each))
    yield from itertools.product(
        (None, as_float(padding), torch.randn(BATCH, keys, dtype=torch.float64)),
        (None, bias, as_float(each)),
    )


FLAGS = ("bias", "add_bias_kv", "add_zero_attn", "batch_first")
CONFIGURATIONS = [
    dict(zip(FLAGS, flags, strict=True))
    for flags in itertools.product((True, False), repeat=len(FLAGS))
]


def name_of(value: Any) -> str | None:
    return (
        "-".join(key for key, on in value.items() if on) or "none"
        if isinstance(value, dict)
        else None
    )


@pytest.mark.parametrize(
    ("configuration", "widths"),
    in_turn(CONFIGURATIONS, [{}, {"kdim": 6, "vdim": 10}, {"vdim": 8}]),
)
def test_cross_attention_is_torchs(configuration: dict[str, bool], widths: dict[str, int]) -> None:
    theirs, ours = pair(**configuration, **widths)
    lengths = (QUERIES, KEYS, KEYS)
    inputs = [
        torch.randn(BATCH, n, d, dtype=torch.float64)
        for n, d in zip(lengths, (SIZE, ours.kdim, ours.vdim), strict=True)
    ]
    inputs = [(x if ours.batch_first else x.transpose(0, 1)).requires_grad_() for x in inputs]
    forms = itertools.cycle([{"need_weights": False}, {}, {"average_attn_weights": False}])
    for (padding, mask), form in zip(masks(QUERIES, KEYS), forms, strict=False):
        assert_same(theirs, ours, inputs, DOUBLE, key_padding_mask=padding, attn_mask=mask, **form)


@pytest.mark.parametrize(
    ("configuration", "shared"),
    in_turn(CONFIGURATIONS, ["query is key is value", "key is value"]),
)
def test_shared_inputs_are_torchs(configuration: dict[str, bool], shared: str) -> None:
    theirs, ours = pair(**configuration)
    x, y = (
        torch.randn(BATCH, KEYS, SIZE, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    if not ours.batch_first:
        x, y = (z.detach().transpose(0, 1).requires_grad_() for z in (x, y))
    inputs = [x, x, x] if shared.startswith("query") else [x, y, y]
    forms = itertools.cycle([{"average_attn_weights": False}, {"need_weights": False}, {}])
    for (padding, mask), form in zip(masks(KEYS, KEYS), forms, strict=False):
        assert_same(theirs, ours, inputs, DOUBLE, key_padding_mask=padding, attn_mask=mask, **form)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=name_of)
def test_causal_is_torchs(
    batch_first: bool, need_weights: bool, padded: bool, extra: dict[str, bool]
) -> None:
    theirs, ours = pair(batch_first=batch_first, **extra)
    x = torch.randn(BATCH, KEYS, SIZE, dtype=torch.float64)
    x = (x if batch_first else x.transpose(0, 1)).requires_grad_()
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[0, 3:] = True
    for form, hint in itertools.product((lambda m: m, as_float), (False, True)):
        # With an appended key torch's own hint hides it from all but the last query; its mask does
        # not.
        theirs_hint = hint and not extra
        call = {
            "key_padding_mask": form(padding) if padded else None,
            "need_weights": need_weights,
            "attn_mask": form(causal_bool(KEYS)),
        }
        expected, found = (
            theirs(x, x, x, is_causal=theirs_hint, **call),
            ours(x, x, x, is_causal=hint, **call),
        )
        torch.testing.assert_close(found, expected, **DOUBLE)
        for a, b in zip(gradients(theirs, [x], expected), gradients(ours, [x], found), strict=True):
            torch.testing.assert_close(b, a, **DOUBLE)
        del call["attn_mask"]
        torch.testing.assert_close(ours(x, x, x, is_causal=True, **call), expected, **DOUBLE)


@pytest.mark.parametrize("average", [False, True])
def test_unbatched_is_torchs(average: bool) -> None:
    theirs, ours = pair(kdim=6, batch_first=average)
    inputs = [
        torch.randn(n, d, dtype=torch.float64, requires_grad=True)
        for n, d in ((QUERIES, SIZE), (KEYS, 6), (KEYS, SIZE))
    ]
    padding = torch.tensor([False, True, False, False, True, False, False])
    each = torch.rand(HEADS, QUERIES, KEYS) < 0.3
    each[..., 0] = False
    for mask in (None, each[0], each):
        assert_same(
            theirs,
            ours,
            inputs,
            DOUBLE,
            key_padding_mask=padding,
            attn_mask=mask,
            average_attn_weights=average,
        )
        assert_same(
            theirs,
            ours,
            inputs,
            DOUBLE,
            key_padding_mask=padding,
            attn_mask=mask,
            need_weights=False,
        )


@pytest.mark.parametrize("training", [True, False])
def test_float32_is_torchs(training: bool) -> None:
    theirs, ours = pair(dtype=torch.float32, batch_first=True)
    theirs.train(training)
    ours.train(training)
    x = torch.randn(BATCH, 33, SIZE, requires_grad=True)
    padding = torch.zeros(BATCH, 33, dtype=torch.bool)
    padding[1, 20:] = True
    for mask, need_weights in itertools.product((None, padding), (True, False)):
        assert_same(
            theirs, ours, [x, x, x], SINGLE, key_padding_mask=mask, need_weights=need_weights
        )
        with torch.no_grad():  # torch's own fast path, where it has one
            expected, found = (
                module(x, x, x, key_padding_mask=mask, need_weights=need_weights)
                for module in (theirs, ours)
            )
        torch.testing.assert_close(found, expected, **SINGLE)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_query_that_sees_nothing_gets_zero_before_the_output_projection(
    need_weights: bool,
) -> None:
    _, ours = pair(batch_first=True)
    nn.init.normal_(ours.out_proj.bias)
    x = torch.randn(BATCH, KEYS, SIZE, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[True] * KEYS, [False] * KEYS])
    out, weights = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    torch.testing.assert_close(out[0], ours.out_proj.bias.expand(KEYS, -1))
    assert weights is None or (weights[0] == 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients(ours, [x], (out, None)))


def test_causality_without_a_mask_is_aligned_bottom_right() -> None:
    _, ours = pair(batch_first=True)
    q, k = (
        torch.randn(1, 2, SIZE, dtype=torch.float64),
        torch.randn(1, 5, SIZE, dtype=torch.float64),
    )
    _, weights = ours(q, k, k, is_causal=True)
    assert ((weights[0] > 0) == torch.ones(2, 5).tril(3).bool()).all()


def test_the_hint_adds_causality_to_another_square_mask() -> None:
    _, ours = pair(batch_first=True)
    x = torch.randn(BATCH, KEYS, SIZE, dtype=torch.float64)
    bias = torch.randn(KEYS, KEYS, dtype=torch.float64)
    expected = ours(x, x, x, attn_mask=bias.masked_fill(causal_bool(KEYS), float("-inf")))
    torch.testing.assert_close(ours(x, x, x, attn_mask=bias, is_causal=True), expected, **DOUBLE)


@pytest.mark.parametrize("lengths", [(QUERIES, KEYS), (KEYS, QUERIES)], ids=str)
def test_beside_the_hint_a_mask_that_is_not_square_rules_alone(lengths: tuple[int, int]) -> None:
    """torch's masks for cross-attention start their diagonal at the first key, which is not where
    is_causal has it."""
    theirs, ours = pair(batch_first=True)
    inputs = [
        torch.randn(BATCH, n, SIZE, dtype=torch.float64, requires_grad=True)
        for n in (*lengths, lengths[1])
    ]
    hidden = torch.ones(lengths, dtype=torch.bool).triu(1)
    assert_same(theirs, ours, inputs, DOUBLE, attn_mask=hidden, is_causal=True)


def test_a_learned_mask_gets_its_gradient_at_zero() -> None:
    _, ours = pair(batch_first=True)
    x = torch.randn(BATCH, KEYS, SIZE, dtype=torch.float64)
    bias, key_bias = (
        torch.zeros(KEYS, KEYS, dtype=torch.float64),
        torch.zeros(BATCH, KEYS, dtype=torch.float64),
    )
    out, _ = ours(
        x,
        x,
        x,
        attn_mask=bias.requires_grad_(),
        key_padding_mask=key_bias.requires_grad_(),
        need_weights=False,
    )
    assert all(
        gradient.abs().max() > 0
        for gradient in torch.autograd.grad(out.square().sum(), (bias, key_bias))
    )


def test_dropout_acts_in_training_only_and_not_on_the_returned_weights() -> None:
    ours = MultiheadAttention(SIZE, HEADS, dropout=0.5, batch_first=True)
    x = torch.randn(BATCH, KEYS, SIZE)
    evaluated, weights = ours.eval()(x, x, x)
    trained, trained_weights = ours.train()(x, x, x)
    assert not torch.allclose(evaluated, trained)
    torch.testing.assert_close(trained_weights, weights)
    assert ours.attention.training
    many = x[:1].expand(4000, -1, -1)
    torch.testing.assert_close(
        ours(many, many, many, need_weights=False)[0].mean(0), evaluated[0], atol=0.05, rtol=0.0
    )


@pytest.mark.parametrize("widths", [{}, {"kdim": 6}], ids=name_of)
@pytest.mark.parametrize("case", usual_cases(), ids=str)
def test_state_dict_goes_both_ways(case: Case, widths: dict[str, int]) -> None:
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(SIZE, HEADS, kdim=widths.get("kdim"))
    ours = MultiheadAttention(SIZE, HEADS, **widths, **options_of(case))
    own = copy.deepcopy(ours.attention.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
    for (
        key,
        value,
        # What torch has not stays, but for projections of global tokens, which begin as copies.
    ) in own.items():
        copied = (
            theirs.state_dict()[key.replace("global_projection.", "in_proj_")]
            if "global_projection" in key
            else value
        )
        assert torch.equal(ours.attention.state_dict()[key], copied)
    if own:
        partial = ours.state_dict()
        partial.pop(f"attention.{next(iter(own))}")
        partial["attention.unheard_of"] = torch.zeros(1)
        with pytest.raises(RuntimeError, match="unheard_of"):
            ours.load_state_dict(partial, strict=True)
    else:
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("case", usual_cases(), ids=str)
def test_own_state_survives_a_round_trip_and_a_whole_torch_checkpoint_loads(case: Case) -> None:
    def layer(seed: int) -> nn.TransformerEncoderLayer:
        torch.manual_seed(seed)
        made = nn.TransformerEncoderLayer(SIZE, HEADS, 16, batch_first=True)
        made.self_attn = MultiheadAttention(SIZE, HEADS, batch_first=True, **options_of(case))
        return made.eval()

    first, second = layer(1), layer(2)
    second.load_state_dict(first.state_dict(), strict=True)
    x = torch.randn(BATCH, KEYS, SIZE)
    masks = layer_masks(case.spec, KEYS)
    assert torch.equal(first(x, **masks), second(x, **masks))
    checkpoint = nn.TransformerEncoderLayer(SIZE, HEADS, 16, batch_first=True).state_dict()
    keys = list(checkpoint)
    second.load_state_dict(checkpoint, strict=True, assign=True)
    assert list(checkpoint) == keys, "loading must not touch the caller's dictionary"
    assert torch.equal(second.self_attn.in_proj_weight, checkpoint["self_attn.in_proj_weight"])


def runs_in_torchs_layer(module: Any) -> bool:
    """Whether torch's layer calls it where its fast path would do without; two heads, since that
    path refuses an odd number."""
    layer = nn.TransformerEncoderLayer(
        SIZE, 2, 16, 0.0, batch_first=True, dtype=torch.float64
    ).eval()
    layer.self_attn, called = module, []
    module.num_heads, module.forward = 2, lambda x, *args, **kwargs: called.append(x) or (x, None)
    with torch.no_grad():
        layer(torch.zeros(BATCH, KEYS, SIZE, dtype=torch.float64))
    return len(called) == 1


@pytest.mark.parametrize("case", usual_cases(), ids=str)
def test_copies_and_pickles(case: Case) -> None:
    ours = MultiheadAttention(
        SIZE, HEADS, batch_first=True, dtype=torch.float64, **options_of(case)
    ).eval()
    assert all(
        x.dtype == torch.float64 for x in ours.state_dict().values() if x.is_floating_point()
    )
    x = torch.randn(BATCH, KEYS, SIZE, dtype=torch.float64)
    expected = ours(x, x, x, need_weights=False, **possible(case.spec))[0]
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(x, x, x, need_weights=False, **possible(case.spec))[0], expected)
        assert twin._qkv_same_embed_dim and runs_in_torchs_layer(twin)


def test_reset_parameters_draws_torchs_numbers_again() -> None:
    theirs, ours = pair(add_bias_kv=True)
    for module in (theirs, ours):
        torch.manual_seed(11)
        module._reset_parameters()
    for x, y in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(x, y)
    assert ours._qkv_same_embed_dim


def test_device_and_dtype_reach_the_core() -> None:
    for case in usual_cases():
        ours = MultiheadAttention(SIZE, HEADS, device="meta", **options_of(case))
        assert all(x.is_meta for x in [*ours.parameters(), *ours.buffers()])
        x = torch.empty(KEYS, BATCH, SIZE, device="meta")
        assert ours(x, x, x, need_weights=False, **possible(case.spec))[0].shape == x.shape
