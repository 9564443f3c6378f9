"""MultiheadAttention is torch's with the standard core, runs every other core in its place, and is never bypassed by torch's layers."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, usual_cases
from torch import Tensor, nn

import attnzoo
from attnzoo import MultiheadAttention, UnsupportedError

BATCH, QUERIES, KEYS, SIZE, HEADS = 2, 5, 7, 12, 3
DOUBLE: dict[str, Any] = {"atol": 1e-11, "rtol": 1e-10}
SINGLE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}
CAUSAL_CASES = [case for case in usual_cases() if case.spec.causal]
MASKLESS_CASES = [case for case in CAUSAL_CASES if not case.spec.attn_mask]
OTHER_CASES = [case for case in usual_cases() if case.variant != "standard"]


def options_of(case: Case) -> dict[str, Any]:
    return {"attention": case.variant, "attention_options": {**({"max_length": 64} if case.spec.needs_max_length else {}), **case.options}}


def causal_bool(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def as_float(mask: Tensor | None, dtype: torch.dtype = torch.float64) -> Tensor | None:
    return None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, float("-inf"))


def pair(*, seed: int = 3, **options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """torch's module and this one, each made from the same seed."""
    options = {"embed_dim": SIZE, "num_heads": HEADS, "dtype": torch.float64, **options}
    torch.manual_seed(seed)
    theirs = nn.MultiheadAttention(**options)
    torch.manual_seed(seed)
    return theirs, MultiheadAttention(**options)


def gradients(module: nn.Module, inputs: list[Tensor], outputs: tuple[Tensor, Tensor | None]) -> list[Tensor]:
    """Of a fixed random functional of all outputs, by every parameter and input."""
    generator = torch.Generator().manual_seed(5)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum() for x in outputs if x is not None)
    assert isinstance(loss, Tensor)
    parameters = list({id(x): x for x in [*module.parameters(), *inputs]}.values())
    return [x if x is not None else torch.zeros(()) for x in torch.autograd.grad(loss, parameters, allow_unused=True)]


def assert_same(theirs: nn.MultiheadAttention, ours: MultiheadAttention, inputs: list[Tensor], tolerance: dict[str, Any], **call: Any) -> None:
    expected, found = theirs(*inputs, **call), ours(*inputs, **call)
    assert (expected[1] is None) == (found[1] is None)
    for x, y in zip(expected, found, strict=True):
        if x is not None:
            torch.testing.assert_close(y, x, **tolerance)
    for x, y in zip(gradients(theirs, inputs, expected), gradients(ours, inputs, found), strict=True):
        torch.testing.assert_close(y, x, **tolerance)


def masks(queries: int, keys: int) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Padding and attention masks in every form that torch takes, such that every query sees a key."""
    padding = torch.zeros(BATCH, keys, dtype=torch.bool)
    padding[0, -2:] = padding[1, 1] = True
    flat = torch.rand(queries, keys) < 0.4
    each = torch.rand(BATCH * HEADS, queries, keys) < 0.4
    flat[:, 0] = each[..., 0] = False
    bias = torch.randn(queries, keys, dtype=torch.float64).masked_fill(flat, float("-inf"))
    yield from itertools.product((None, padding), (None, flat, each))
    yield from itertools.product((None, as_float(padding), torch.randn(BATCH, keys, dtype=torch.float64)), (bias, as_float(each)))


FLAGS = ("bias", "add_bias_kv", "add_zero_attn", "batch_first")
CONFIGURATIONS = [dict(zip(FLAGS, flags, strict=True)) for flags in itertools.product((True, False), repeat=len(FLAGS))]


def name_of(value: Any) -> str | None:
    return "-".join(key for key, on in value.items() if on) or "none" if isinstance(value, dict) else None


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=name_of)
@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 10}, {"vdim": 8}], ids=name_of)
def test_cross_attention_is_torchs(configuration: dict[str, bool], widths: dict[str, int]) -> None:
    theirs, ours = pair(**configuration, **widths)
    lengths = (QUERIES, KEYS, KEYS)
    inputs = [torch.randn(BATCH, n, d, dtype=torch.float64) for n, d in zip(lengths, (SIZE, ours.kdim, ours.vdim), strict=True)]
    inputs = [(x if ours.batch_first else x.transpose(0, 1)).requires_grad_() for x in inputs]
    forms = itertools.cycle([{"need_weights": False}, {}, {"average_attn_weights": False}])
    for (padding, mask), form in zip(masks(QUERIES, KEYS), forms, strict=False):
        assert_same(theirs, ours, inputs, DOUBLE, key_padding_mask=padding, attn_mask=mask, **form)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=name_of)
@pytest.mark.parametrize("shared", ["query is key is value", "key is value"])
def test_shared_inputs_are_torchs(configuration: dict[str, bool], shared: str) -> None:
    theirs, ours = pair(**configuration)
    x, y = (torch.randn(BATCH, KEYS, SIZE, dtype=torch.float64, requires_grad=True) for _ in range(2))
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
def test_causal_is_torchs(batch_first: bool, need_weights: bool, padded: bool, extra: dict[str, bool]) -> None:
    theirs, ours = pair(batch_first=batch_first, **extra)
    x = torch.randn(BATCH, KEYS, SIZE, dtype=torch.float64)
    x = (x if batch_first else x.transpose(0, 1)).requires_grad_()
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[0, 3:] = True
    for form, hint in itertools.product((lambda m: m, as_float), (False, True)):
        # With an appended key torch's own hint hides it from all but the last query; its mask does not.
        theirs_hint = hint and not extra
        call = {"key_padding_mask": form(padding) if padded else None, "need_weights": need_weights, "attn_mask": form(causal_bool(KEYS))}
        expected, found = theirs(x, x, x, is_causal=theirs_hint, **call), ours(x, x, x, is_causal=hint, **call)
        torch.testing.assert_close(found, expected, **DOUBLE)
        for a, b in zip(gradients(theirs, [x], expected), gradients(ours, [x], found), strict=True):
            torch.testing.assert_close(b, a, **DOUBLE)
        del call["attn_mask"]
        torch.testing.assert_close(ours(x, x, x, is_causal=True, **call), expected, **DOUBLE)


@pytest.mark.parametrize("average", [False, True])
def test_unbatched_is_torchs(average: bool) -> None:
    theirs, ours = pair(kdim=6, batch_first=average)
    inputs = [torch.randn(n, d, dtype=torch.float64, requires_grad=True) for n, d in ((QUERIES, SIZE), (KEYS, 6), (KEYS, SIZE))]
    padding = torch.tensor([False, True, False, False, True, False, False])
    each = torch.rand(HEADS, QUERIES, KEYS) < 0.3
    each[..., 0] = False
    for mask in (None, each[0], each):
        assert_same(theirs, ours, inputs, DOUBLE, key_padding_mask=padding, attn_mask=mask, average_attn_weights=average)
        assert_same(theirs, ours, inputs, DOUBLE, key_padding_mask=padding, attn_mask=mask, need_weights=False)


@pytest.mark.parametrize("training", [True, False])
def test_float32_is_torchs(training: bool) -> None:
    theirs, ours = pair(dtype=torch.float32, batch_first=True)
    theirs.train(training)
    ours.train(training)
    x = torch.randn(BATCH, 33, SIZE, requires_grad=True)
    padding = torch.zeros(BATCH, 33, dtype=torch.bool)
    padding[1, 20:] = True
    for mask, need_weights in itertools.product((None, padding), (True, False)):
        assert_same(theirs, ours, [x, x, x], SINGLE, key_padding_mask=mask, need_weights=need_weights)
        with torch.no_grad():  # torch's own fast path, where it has one
            expected, found = (module(x, x, x, key_padding_mask=mask, need_weights=need_weights) for module in (theirs, ours))
        torch.testing.assert_close(found, expected, **SINGLE)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_query_that_sees_nothing_gets_zero_before_the_output_projection(need_weights: bool) -> None:
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
    q, k = torch.randn(1, 2, SIZE, dtype=torch.float64), torch.randn(1, 5, SIZE, dtype=torch.float64)
    _, weights = ours(q, k, k, is_causal=True)
    assert ((weights[0] > 0) == torch.ones(2, 5).tril(3).bool()).all()


def test_the_hint_adds_causality_to_another_square_mask() -> None:
    _, ours = pair(batch_first=True)
    x = torch.randn(BATCH, KEYS, SIZE, dtype=torch.float64)
    bias = torch.randn(KEYS, KEYS, dtype=torch.float64)
    expected = ours(x, x, x, attn_mask=bias.masked_fill(causal_bool(KEYS), float("-inf")))
    torch.testing.assert_close(ours(x, x, x, attn_mask=bias, is_causal=True), expected, **DOUBLE)


def test_a_learned_mask_gets_its_gradient_at_zero() -> None:
    _, ours = pair(batch_first=True)
    x = torch.randn(BATCH, KEYS, SIZE, dtype=torch.float64)
    bias, key_bias = torch.zeros(KEYS, KEYS, dtype=torch.float64), torch.zeros(BATCH, KEYS, dtype=torch.float64)
    out, _ = ours(x, x, x, attn_mask=bias.requires_grad_(), key_padding_mask=key_bias.requires_grad_(), need_weights=False)
    assert all(gradient.abs().max() > 0 for gradient in torch.autograd.grad(out.square().sum(), (bias, key_bias)))


def test_dropout_acts_in_training_only_and_not_on_the_returned_weights() -> None:
    ours = MultiheadAttention(SIZE, HEADS, dropout=0.5, batch_first=True)
    x = torch.randn(BATCH, KEYS, SIZE)
    evaluated, weights = ours.eval()(x, x, x)
    trained, trained_weights = ours.train()(x, x, x)
    assert not torch.allclose(evaluated, trained)
    torch.testing.assert_close(trained_weights, weights)
    assert ours.attention.training
    mean = torch.stack([ours(x, x, x, need_weights=False)[0] for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, evaluated, atol=0.05, rtol=0.0)


# state_dict, copies


@pytest.mark.parametrize("widths", [{}, {"kdim": 6}], ids=name_of)
@pytest.mark.parametrize("case", usual_cases(), ids=str)
def test_state_dict_goes_both_ways(case: Case, widths: dict[str, int]) -> None:
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(SIZE, HEADS, **widths)
    ours = MultiheadAttention(SIZE, HEADS, **widths, **options_of(case))
    own = copy.deepcopy(ours.attention.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
    for key, value in own.items():
        assert torch.equal(ours.attention.state_dict()[key], value)
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
    assert torch.equal(first(x), second(x))
    checkpoint = nn.TransformerEncoderLayer(SIZE, HEADS, 16, batch_first=True).state_dict()
    keys = list(checkpoint)
    second.load_state_dict(checkpoint, strict=True, assign=True)
    assert list(checkpoint) == keys, "loading must not touch the caller's dictionary"
    assert torch.equal(second.self_attn.in_proj_weight, checkpoint["self_attn.in_proj_weight"])


@pytest.mark.parametrize("case", usual_cases(), ids=str)
def test_copies_and_pickles(case: Case) -> None:
    ours = MultiheadAttention(SIZE, HEADS, batch_first=True, dtype=torch.float64, **options_of(case)).eval()
    assert all(x.dtype == torch.float64 for x in ours.state_dict().values() if x.is_floating_point())
    x = torch.randn(BATCH, KEYS, SIZE, dtype=torch.float64)
    expected = ours(x, x, x, need_weights=False)[0]
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(x, x, x, need_weights=False)[0], expected)
        assert not twin._qkv_same_embed_dim


def test_reset_parameters_draws_torchs_numbers_again() -> None:
    theirs, ours = pair(add_bias_kv=True)
    for module in (theirs, ours):
        torch.manual_seed(11)
        module._reset_parameters()
    for x, y in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(x, y)
    assert not ours._qkv_same_embed_dim


def test_device_and_dtype_reach_the_core() -> None:
    for case in usual_cases():
        ours = MultiheadAttention(SIZE, HEADS, device="meta", **options_of(case))
        assert all(x.is_meta for x in [*ours.parameters(), *ours.buffers()])
        x = torch.empty(KEYS, BATCH, SIZE, device="meta")
        assert ours(x, x, x, need_weights=False)[0].shape == x.shape


# The other cores


def by_hand(module: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> tuple[Tensor, Tensor]:
    """(batch, length, features): the core on q, k and v projected one by one, and its weights."""

    def project(x: Tensor, i: int) -> Tensor:
        weight, bias = (part[i * SIZE : (i + 1) * SIZE] for part in (module.in_proj_weight, module.in_proj_bias))
        return F.linear(x, weight, bias).unflatten(-1, (HEADS, SIZE // HEADS)).transpose(1, 2)

    q, k, v = (project(x, i) for i, x in enumerate((query, key, value)))
    out = module.attention(q, k, v, **call)
    return F.linear(out.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias), module.attention.weights(q, k, **call)


def core(case: Case, *, batch_first: bool = True, dtype: torch.dtype = torch.float64, **options: Any) -> MultiheadAttention:
    torch.manual_seed(2)
    made = MultiheadAttention(SIZE, HEADS, batch_first=batch_first, dtype=dtype, **options, **options_of(case))
    nn.init.normal_(made.in_proj_bias)
    nn.init.normal_(made.out_proj.bias)
    return made


@pytest.mark.parametrize("padding_form", [None, lambda m: m, as_float], ids=["unpadded", "bool", "float"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("case", usual_cases(), ids=str)
def test_every_core_runs_on_the_projected_inputs(case: Case, batch_first: bool, padding_form: Callable[[Tensor], Tensor] | None) -> None:
    ours = core(case, batch_first=batch_first)
    x, y = torch.randn(BATCH, 21, SIZE, dtype=torch.float64), torch.randn(BATCH, 21 if not case.spec.cross else 30, SIZE, dtype=torch.float64)
    inputs = {"self": (x, x, x), "cross": (x, y, y), "three": (x, y, y + 1)}
    for (query, key, value), is_causal in itertools.product(inputs.values(), (False, True)):
        if not (case.spec.causal if is_causal else case.spec.bidirectional):
            continue
        padding = torch.zeros(key.shape[:2], dtype=torch.bool)
        padding[0, 17:] = padding[1, 4] = True
        key_mask = None if padding_form is None else ~padding
        expected, expected_weights = by_hand(ours, query, key, value, key_mask=key_mask, is_causal=is_causal)
        masked = None if padding_form is None else padding_form(padding)
        arguments = (query, key, value) if batch_first else tuple(z.transpose(0, 1) for z in (query, key, value))
        if query is key:
            arguments = (arguments[0],) * 3
        out, weights = ours(*arguments, key_padding_mask=masked, is_causal=is_causal, average_attn_weights=False)
        torch.testing.assert_close(out if batch_first else out.transpose(0, 1), expected, **DOUBLE)
        torch.testing.assert_close(weights, expected_weights, **DOUBLE)
        single = ours(query[0], key[0], value[0], key_padding_mask=None if masked is None else masked[0], is_causal=is_causal)
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
    for mask, hint in itertools.product((flat, as_float(flat), as_float(flat, torch.float32), each, as_float(each)), (False, True)):
        assert torch.equal(ours(x, x, x, attn_mask=mask, is_causal=hint, need_weights=False)[0], expected)
    assert torch.equal(ours(x[0], x[0], x[0], attn_mask=flat, need_weights=False)[0], ours(x[:1], x[:1], x[:1], is_causal=True)[0][0])


@pytest.mark.parametrize("case", MASKLESS_CASES, ids=str)
def test_any_other_mask_is_refused_where_the_core_has_none(case: Case) -> None:
    ours = core(case)
    x = torch.randn(BATCH, 9, SIZE, dtype=torch.float64)
    others = [causal_bool(9).T, causal_bool(9) | (torch.rand(9, 9) < 0.5), torch.zeros(9, 9, dtype=torch.bool), torch.randn(9, 9)]
    for mask, hint in itertools.product(others, (False, True)):
        with pytest.raises(UnsupportedError, match=f"{case.variant} cannot apply an attn_mask"):
            ours(x, x, x, attn_mask=mask, is_causal=hint)
    with pytest.raises(UnsupportedError, match=f"{case.variant} cannot add a float key_padding_mask"):
        ours(x, x, x, key_padding_mask=torch.randn(BATCH, 9))


@pytest.mark.parametrize("case", [case for case in usual_cases() if not case.spec.causal], ids=str)
def test_a_causal_mask_is_refused_where_the_core_cannot_be_causal(case: Case) -> None:
    x = torch.randn(BATCH, 9, SIZE, dtype=torch.float64)
    for call in ({"is_causal": True}, {"attn_mask": causal_bool(9)}, {"attn_mask": as_float(causal_bool(9)), "is_causal": True}):
        with pytest.raises(UnsupportedError, match=f"{case.variant} cannot be causal"):
            core(case)(x, x, x, **call)


@pytest.mark.parametrize("padding_form", [lambda m: m, as_float], ids=["bool", "float"])
@pytest.mark.parametrize("case", usual_cases(), ids=str)
def test_what_stands_in_padding_reaches_no_real_row(case: Case, padding_form: Callable[[Tensor], Tensor]) -> None:
    ours = core(case, dtype=torch.float32)
    x = torch.randn(BATCH, 9, SIZE)
    padding = torch.zeros(BATCH, 9, dtype=torch.bool)
    padding[:, 6:] = True
    poisoned = x.masked_fill(padding[..., None], float("nan"))
    call = {"key_padding_mask": padding_form(padding), "need_weights": False, "is_causal": not case.spec.bidirectional}
    assert torch.equal(ours(x, x, x, **call)[0][:, :6], ours(x, poisoned, poisoned, **call)[0][:, :6])


# Inside torch's layers


def count_calls(module: MultiheadAttention) -> list[str]:
    """The list fills with the backend of every call of the core. Not a hook: torch's fast path steps aside for hooks."""
    calls: list[str] = []
    inner = module.attention.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        out = inner(*args, **kwargs)
        assert module.attention.last_backend is not None
        calls.append(module.attention.last_backend)
        return out

    module.attention.forward = forward  # type: ignore[method-assign]
    return calls


def encoder_layer(case: Case | None, *, norm_first: bool = False, batch_first: bool = True, dropout: float = 0.0) -> nn.TransformerEncoderLayer:
    """torch's own when case is None. Two heads, since torch's fast path refuses an odd number."""
    torch.manual_seed(4)
    layer = nn.TransformerEncoderLayer(SIZE, 2, 16, dropout, batch_first=batch_first, norm_first=norm_first)
    if case is not None:
        made = MultiheadAttention(SIZE, 2, batch_first=batch_first, **options_of(case))
        made.load_state_dict(layer.self_attn.state_dict(), strict=True)
        layer.self_attn = made
    return layer


def compose(layer: nn.TransformerEncoderLayer, x: Tensor, **masks: Any) -> Tensor:
    """The encoder layer's equations, by hand."""

    def attend(y: Tensor) -> Tensor:
        return layer.self_attn(y, y, y, need_weights=False, **masks)[0]

    def feed(y: Tensor) -> Tensor:
        return layer.linear2(F.relu(layer.linear1(y)))

    if layer.norm_first:
        x = x + attend(layer.norm1(x))
        return x + feed(layer.norm2(x))
    x = layer.norm1(x + attend(x))
    return layer.norm2(x + feed(x))


MODES = [(True, nullcontext), (False, nullcontext), (False, torch.no_grad), (False, torch.inference_mode), (True, torch.no_grad)]


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("case", usual_cases(), ids=str)
def test_encoder_layer_runs_the_core_in_every_mode(case: Case, norm_first: bool) -> None:
    layer, plain = encoder_layer(case, norm_first=norm_first), encoder_layer(None, norm_first=norm_first)
    calls = count_calls(layer.self_attn)
    x = torch.randn(BATCH, 40, SIZE)
    padding = torch.zeros(BATCH, 40, dtype=torch.bool)
    padding[1, 33:] = True
    causal = case.spec.causal
    for (training, context), padded, masked in itertools.product(MODES, (None, padding), (None, causal_bool(40)) if causal else (None,)):
        if masked is None and not case.spec.bidirectional:
            continue
        layer.train(training)
        plain.train(training)
        calls.clear()
        with context():
            out = layer(x, src_mask=masked, src_key_padding_mask=padded)
            assert len(calls) == 1
            expected = compose(layer, x, key_padding_mask=padded, is_causal=masked is not None)
            exact = plain(x, src_mask=masked, src_key_padding_mask=padded)
        real = slice(None) if padded is None else ~padded
        torch.testing.assert_close(out, expected, **SINGLE)
        assert torch.allclose(out[real], exact[real], **SINGLE) == (case.variant == "standard")
        if masked is not None:
            with context():
                hinted = layer(x, src_mask=as_float(masked, torch.float32), src_key_padding_mask=padded, is_causal=True)
            assert torch.equal(hinted, out)


@pytest.mark.parametrize("swapped", ["before", "after"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("case", usual_cases(), ids=str)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors")
def test_encoder_stack_runs_the_core_in_every_mode(case: Case, norm_first: bool, swapped: str) -> None:
    """With nested tensors on, as by default: a stack built before the swap hands them to its layers."""
    stack = nn.TransformerEncoder(encoder_layer(case if swapped == "before" else None, norm_first=norm_first), 2)
    if swapped == "after":
        for layer in stack.layers:
            layer.self_attn = encoder_layer(case, norm_first=norm_first).self_attn
    calls = [count_calls(layer.self_attn) for layer in stack.layers]
    x = torch.randn(BATCH, 40, SIZE)
    padding = torch.zeros(BATCH, 40, dtype=torch.bool)
    padding[1, 33:] = True
    for (training, context), padded in itertools.product(MODES, (None, padding)):
        if not case.spec.bidirectional:
            continue
        stack.train(training)
        for each in calls:
            each.clear()
        with context():
            out = stack(x, src_key_padding_mask=padded)
            assert [len(each) for each in calls] == [1, 1]
            expected = x
            for layer in stack.layers:
                expected = compose(layer, expected, key_padding_mask=padded)
        real = slice(None) if padded is None else ~padded
        torch.testing.assert_close(out[real], expected[real], **SINGLE)
    if case.spec.causal:
        with torch.no_grad():
            by_mask = stack.eval()(x, mask=nn.Transformer.generate_square_subsequent_mask(40))
            expected = x
            for layer in stack.layers:
                expected = compose(layer, expected, is_causal=True)
        torch.testing.assert_close(by_mask, expected, **SINGLE)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("case", [case for case in CAUSAL_CASES if case.spec.cross], ids=str)
def test_decoder_stack_runs_both_cores(case: Case, norm_first: bool, batch_first: bool) -> None:
    def decoder(case: Case) -> nn.TransformerDecoder:
        torch.manual_seed(6)
        layer = nn.TransformerDecoderLayer(SIZE, HEADS, 16, 0.0, batch_first=batch_first, norm_first=norm_first)
        for name in ("self_attn", "multihead_attn"):
            made = MultiheadAttention(SIZE, HEADS, batch_first=batch_first, **options_of(case))
            made.load_state_dict(getattr(layer, name).state_dict(), strict=True)
            setattr(layer, name, made)
        return nn.TransformerDecoder(layer, 2)

    def compose_decoder(x: Tensor) -> Tensor:
        for layer in stack.layers:

            def attend(y: Tensor, layer: Any = layer) -> Tensor:
                return layer.self_attn(y, y, y, is_causal=True, need_weights=False)[0]

            def cross(y: Tensor, layer: Any = layer) -> Tensor:
                return layer.multihead_attn(y, memory, memory, key_padding_mask=padding, need_weights=False)[0]

            def feed(y: Tensor, layer: Any = layer) -> Tensor:
                return layer.linear2(F.relu(layer.linear1(y)))

            for norm, block in ((layer.norm1, attend), (layer.norm2, cross), (layer.norm3, feed)):
                x = x + block(norm(x)) if norm_first else norm(x + block(x))
        return x

    stack = decoder(case)
    calls = [count_calls(getattr(layer, name)) for layer in stack.layers for name in ("self_attn", "multihead_attn")]
    x, memory = torch.randn(BATCH, 8, SIZE), torch.randn(BATCH, 11, SIZE)
    if not batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    padding = torch.zeros(BATCH, 11, dtype=torch.bool)
    padding[0, 6:] = True
    for (training, context), mask in itertools.product(MODES, (causal_bool(8), nn.Transformer.generate_square_subsequent_mask(8))):
        stack.train(training)
        for each in calls:
            each.clear()
        with context():
            found = stack(x, memory, tgt_mask=mask, memory_key_padding_mask=padding)
            assert [len(each) for each in calls] == [1] * 4
            torch.testing.assert_close(found, compose_decoder(x), **SINGLE)


@pytest.mark.parametrize("case", OTHER_CASES, ids=str)
def test_gradients_flow_through_a_layer(case: Case) -> None:
    layer = encoder_layer(case)
    x = torch.randn(BATCH, 9, SIZE, requires_grad=True)
    padding = torch.zeros(BATCH, 9, dtype=torch.bool)
    padding[0, 5:] = True
    layer(x, src_key_padding_mask=padding)[~padding].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())


# Autocast and compile


@pytest.mark.parametrize("case", usual_cases(), ids=str)
def test_autocast(case: Case) -> None:
    layer = encoder_layer(case)
    x = torch.randn(BATCH, 40, SIZE)
    padding = torch.zeros(BATCH, 40, dtype=torch.bool)
    padding[1, 33:] = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attended, _ = layer.self_attn(x, x, x, key_padding_mask=padding)
        out = layer(x, src_key_padding_mask=padding, src_mask=causal_bool(40) if case.spec.causal else None)
        out.sum().backward()
    assert attended.dtype == torch.bfloat16
    full, _ = layer.self_attn(x, x, x, key_padding_mask=padding)
    torch.testing.assert_close(attended.float(), full, atol=0.05, rtol=0.05)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_autocast_with_float_masks_and_appended_keys_is_torchs() -> None:
    theirs, ours = pair(dtype=torch.float32, add_bias_kv=True, add_zero_attn=True)
    x, bias = torch.randn(KEYS, BATCH, SIZE), torch.randn(KEYS, KEYS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, _ = theirs(x, x, x, attn_mask=bias, need_weights=False)
        found, _ = ours(x, x, x, attn_mask=bias, need_weights=False)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("case", usual_cases(), ids=str)
def test_encoder_layer_compiles_into_one_graph(case: Case) -> None:
    torch._dynamo.reset()
    layer = encoder_layer(case).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(BATCH, 9, SIZE)
    padding = torch.zeros(BATCH, 9, dtype=torch.bool)
    padding[1, 6:] = True
    masks: list[dict[str, Any]] = [{"src_key_padding_mask": padding}]
    if case.spec.causal:
        masks.append({"src_key_padding_mask": padding, "src_mask": causal_bool(9), "is_causal": True})
    for call in masks:
        torch.testing.assert_close(compiled(x, **call), layer(x, **call), **SINGLE)


def test_a_compiled_graph_checks_the_masks_that_it_cannot_read() -> None:
    torch._dynamo.reset()
    module = MultiheadAttention(SIZE, HEADS, batch_first=True, attention="linear")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(BATCH, 9, SIZE)
    with pytest.raises(RuntimeError, match="linear cannot apply an attn_mask"):
        compiled(x, x, x, attn_mask=causal_bool(9).T, is_causal=True, need_weights=False)
    with pytest.raises(RuntimeError, match="linear cannot add a float key_padding_mask"):
        compiled(x, x, x, key_padding_mask=torch.randn(BATCH, 9), need_weights=False)
    with pytest.raises(Exception, match="say so with is_causal=True"):
        compiled(x, x, x, attn_mask=causal_bool(9), need_weights=False)


def test_a_compiled_standard_core_honours_a_float_padding_mask() -> None:
    torch._dynamo.reset()
    _, ours = pair(batch_first=True)
    x, bias = torch.randn(BATCH, 9, SIZE, dtype=torch.float64), torch.randn(BATCH, 9, dtype=torch.float64)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for mask in (None, causal_bool(9), as_float(causal_bool(9))):
        call = {"key_padding_mask": bias, "attn_mask": mask}
        torch.testing.assert_close(compiled(x, x, x, **call), ours(x, x, x, **call), **DOUBLE)


# Misuse


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
        ({"attention": "linear", "dropout": 0.1}, UnsupportedError, "linear never forms; build with dropout=0.0"),
        ({"attention": "linear", "add_bias_kv": True}, UnsupportedError, "linear cannot place"),
        ({"attention": "linear", "add_zero_attn": True}, UnsupportedError, "linear cannot place"),
    ],
)
def test_a_wrong_constructor_argument_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MultiheadAttention(**{"embed_dim": SIZE, "num_heads": HEADS, **options})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": torch.zeros(KEYS, SIZE)}, "key has shape .* all be batched"),
        ({"query": torch.zeros(1, KEYS, BATCH, SIZE)}, "query has shape .* all be batched"),
        ({"query": torch.zeros(KEYS, BATCH, 5)}, "query has 5 features .* built for 12"),
        ({"key": torch.zeros(KEYS, BATCH, 5)}, "key has 5 features"),
        ({"query": torch.zeros(KEYS, 4, SIZE)}, "batch sizes must agree in .* since batch_first=False"),
        ({"value": torch.zeros(KEYS + 1, BATCH, SIZE)}, "all but the features must agree"),
        ({"query": torch.zeros(KEYS, BATCH, SIZE, dtype=torch.float64)}, "query has dtype torch.float64 and the module torch.float32"),
        ({"query": torch.zeros(KEYS, BATCH, SIZE, dtype=torch.int64)}, "query has dtype torch.int64"),
        ({"query": torch.zeros(KEYS, BATCH, SIZE, device="meta")}, "query is on meta"),
        ({"key_padding_mask": torch.zeros(KEYS, BATCH).bool()}, r"key_padding_mask has shape \(7, 2\); it must be \(2, 7\)"),
        ({"key_padding_mask": torch.zeros(BATCH, KEYS).int()}, "key_padding_mask has dtype torch.int32"),
        ({"attn_mask": torch.zeros(KEYS, KEYS + 1)}, r"attn_mask has shape \(7, 8\); it must be \(7, 7\) or \(6, 7, 7\)"),
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
