"""Every variant, by every backend, against the loops of `attnzoo.oracles`: outputs, A and
gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    CASES,
    FEW_SITUATIONS,
    SITUATIONS,
    Case,
    Situation,
    ask_oracle,
    backends_of,
    can,
    cases,
    close,
    gradients_of,
    library_answer,
    oracle_answer,
    takes,
    tensors,
    with_backends,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from stages import staged, thorough

import attnzoo
from attnzoo.oracles import ORACLES

# Float64 carries 2e-16; sums of a thousand terms and quotients by small normalisers lose four
# digits of it, not six.
FLOAT64_TOLERANCE = 1e-10
# Float32's unit is 6e-8. A score of size 5 loses 5 units in exp, a sum over a thousand keys up to
# sqrt(1000) = 32 of them more.
FLOAT32_TOLERANCE = 64 * 2**-24


def calls_of(case: Case) -> list[tuple[Situation, bool]]:
    """Situations and directions: for the usual form of a variant every pair, but for the longest
    inputs, which have one direction each; for another form each situation in one direction, in
    turn."""
    directions = (False, True)
    if _is_usual(case):
        pairs = [(situation, way) for situation in SITUATIONS for way in directions]
        longest = [situation for situation in SITUATIONS if situation.key_length == 560]
        return [
            (situation, way)
            for situation, way in pairs
            if situation not in longest
            or len(case.spec.forms) == 1
            or directions[longest.index(situation) % 2] == way
        ]
    first = len(str(case)) % 2
    return [
        (situation, way)
        for place, situation in enumerate(FEW_SITUATIONS)
        for way in directions
        if len(case.spec.forms) == 1 or way == directions[(first + place) % 2]
    ]


def first_calls_of(case: Case) -> list[tuple[Situation, bool]]:
    """Those of the first stage: for the usual form the few situations, in one direction each, in
    turn; for another form two of them, one with padding in between."""
    turn = len(str(case))
    few = [
        (situation, bool((turn + place) % 2) if len(case.spec.forms) == 2 else case.spec.forms[0])
        for place, situation in enumerate(FEW_SITUATIONS)
    ]
    return few if _is_usual(case) else [few[2], few[(3, 4, 5, 0, 1)[turn // 2 % 5]]]


def _is_usual(case: Case) -> bool:
    return case == CASES.get(case.variant, [case])[0]


EVERYTHING = [
    staged(case, situation, is_causal, first=(situation, is_causal) in first_calls_of(case))
    for case in cases()
    for situation, is_causal in calls_of(case)
]


@pytest.mark.parametrize("name", attnzoo.names())
def test_every_registered_name_has_an_oracle(name: str) -> None:
    assert name in ORACLES, (
        f"{name} is registered; write its float64 loop in attnzoo/oracles/{name}.py"
    )


def test_every_oracle_and_every_case_belongs_to_a_variant() -> None:
    assert set(ORACLES) <= set(attnzoo.names())
    assert set(CASES) <= set(attnzoo.names())


@pytest.mark.parametrize(("case", "situation", "is_causal"), EVERYTHING)
def test_output_gradients_and_weights(case: Case, situation: Situation, is_causal: bool) -> None:
    """By every backend, of one answer of the oracle, whose loops take longer than all of them."""
    q, k, v, _ = tensors(situation, shift=case.shift)
    masks = {"key_mask": situation.key_mask(), "is_causal": is_causal}
    attn = case.build(situation.heads, dtype=torch.float64)
    if not can(case.spec, is_causal, situation):
        for backend in backends_of(case):
            with pytest.raises(attnzoo.UnsupportedError, match=case.variant):
                library_answer(case, backend, situation, is_causal, torch.float64)
        with pytest.raises(attnzoo.UnsupportedError, match=case.variant):
            attn.weights(q, k, **masks)
        return
    expected = oracle_answer(case, situation, is_causal)
    in_single = [x.float() for x in tensors(situation)[:3]]
    for backend in backends_of(case):
        if not takes(case.build(situation.heads), backend, *in_single, **masks):
            continue  # some other situation reaches it: `backends_of`
        for dtype, tolerance in (
            (torch.float64, FLOAT64_TOLERANCE),
            (torch.float32, FLOAT32_TOLERANCE),
        ):
            actual = library_answer(case, backend, situation, is_causal, dtype)
            how = f"by {backend} in {dtype}"
            close(actual.out, expected.out, tolerance, f"output {how}")
            for name, gradient in expected.gradients.items():
                close(actual.gradients[name], gradient, tolerance, f"gradient of {name} {how}")
    if situation not in FEW_SITUATIONS:
        return
    a = attn.weights(q, k, **masks)
    assert expected.weights is not None
    close(a, expected.weights, FLOAT64_TOLERANCE, "weights")
    shared = v.repeat_interleave(situation.heads // situation.kv_heads, 1)
    close(a @ shared, attn(q, k, v, **masks), FLOAT64_TOLERANCE, "A times v against the fast path")


SCALE = st.sampled_from([None, 0.1, 1.0])
OPTIONS: dict[str, st.SearchStrategy[dict]] = {
    "standard": st.fixed_dictionaries({"scale": SCALE}),
    "sigmoid": st.fixed_dictionaries({"scale": SCALE, "bias": st.sampled_from([None, -2.0, 0.5])}),
    "linformer": st.fixed_dictionaries(
        {
            "rank": st.integers(1, 40),
            "max_length": st.integers(40, 50),
            "sharing": st.sampled_from(["none", "headwise", "key_value", "layerwise"]),
            "scale": SCALE,
        }
    ),
    "linear": st.fixed_dictionaries({"feature_map": st.sampled_from(["elu", "softmax"])}),
    "performer": st.fixed_dictionaries(
        {
            "num_features": st.integers(1, 40),
            "features": st.sampled_from(["positive", "hyperbolic"]),
            "orthogonal": st.booleans(),
            "seed": st.integers(0, 9),
            "scale": SCALE,
        }
    ),
    "sliding_window": st.fixed_dictionaries({"window": st.integers(1, 50), "scale": SCALE}),
    "bigbird": st.fixed_dictionaries(
        {
            "block_size": st.integers(1, 12),
            "num_random_blocks": st.integers(0, 4),
            "num_window_blocks": st.sampled_from([1, 3, 5]),
            "num_global_blocks": st.integers(0, 4),
            "seed": st.integers(0, 9),
            "scale": SCALE,
        }
    ),
    "cosformer": st.fixed_dictionaries({"max_length": st.integers(40, 60)}),
    "retention": st.fixed_dictionaries({"scale": SCALE}),
    "flash": st.fixed_dictionaries({"block_size": st.integers(1, 50), "scale": SCALE}),
    "reformer": st.fixed_dictionaries(
        {
            "num_buckets": st.sampled_from([1, 2, 6, 16]),
            "num_hashes": st.integers(1, 4),
            "chunk_size": st.integers(1, 12),
            "seed": st.integers(0, 9),
            "scale": SCALE,
        }
    ),
    "indexed": st.one_of(
        st.fixed_dictionaries({"top_k": st.integers(1, 12), "scale": SCALE}),
        st.fixed_dictionaries(
            {"top_k": st.sampled_from([12, 24]), "block_size": st.sampled_from([2, 3, 12])}
        ),
    ),
    "moba": st.fixed_dictionaries(
        {"block_size": st.integers(1, 12), "top_k": st.integers(1, 5), "scale": SCALE}
    ),
    "nsa": st.fixed_dictionaries(
        {
            "block_size": st.integers(1, 12),
            "top_k": st.integers(1, 5),
            "window_size": st.integers(1, 20),
            "scale": SCALE,
        }
    ),
    "nystromformer": st.fixed_dictionaries(
        {
            "num_landmarks": st.integers(1, 12),
            "iterations": st.integers(1, 6),
            "convolution": st.sampled_from([None, 1, 5]),
            "scale": SCALE,
        }
    ),
}


@st.composite
def calls(draw: st.DrawFn) -> tuple[Situation, torch.Tensor | None]:
    """Any small lengths, any grouping of heads, any key_mask."""
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    query_length, key_length, batch = (
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
        draw(st.integers(1, 2)),
    )
    situation = Situation(
        query_length, key_length, batch=batch, heads=kv_heads * group, kv_heads=kv_heads
    )
    if draw(st.booleans()):
        return situation, None
    bits = draw(st.lists(st.booleans(), min_size=batch * key_length, max_size=batch * key_length))
    return situation, torch.tensor(bits).view(batch, key_length)


BOTH_WAYS = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


@BOTH_WAYS
@pytest.mark.parametrize("name", attnzoo.names())
@settings(max_examples=5)
@given(call=calls(), data=st.data())
def test_any_shape_mask_and_option(
    name: str, is_causal: bool, call: tuple[Situation, torch.Tensor | None], data: st.DataObject
) -> None:
    check_any_shape(name, is_causal, call, data)


@thorough
@BOTH_WAYS
@pytest.mark.parametrize("name", attnzoo.names())
@settings(max_examples=25)
@given(call=calls(), data=st.data())
def test_many_shapes_masks_and_options(
    name: str, is_causal: bool, call: tuple[Situation, torch.Tensor | None], data: st.DataObject
) -> None:
    check_any_shape(name, is_causal, call, data)


def check_any_shape(
    name: str, is_causal: bool, call: tuple[Situation, torch.Tensor | None], data: st.DataObject
) -> None:
    situation, key_mask = call
    case = Case(name, data.draw(OPTIONS.get(name, st.just({}))))
    q, k, v, upstream = (x.requires_grad_() for x in tensors(situation))
    attn = case.build(situation.heads, dtype=torch.float64)
    masks = {"key_mask": key_mask, "is_causal": is_causal}
    if not can(case.spec, is_causal, situation):
        with pytest.raises(attnzoo.UnsupportedError, match=name):
            attn(q, k, v, **masks)
        return
    expected, a = ask_oracle(attn, q, k, v, options=case.options, **masks)
    out = attn(q, k, v, **masks)
    close(out, expected, FLOAT64_TOLERANCE, f"{case}")
    close(attn.weights(q, k, **masks), a, FLOAT64_TOLERANCE, f"weights of {case}")
    for what, actual, wanted in zip(
        "qkv",
        gradients_of(out, upstream, q, k, v),
        gradients_of(expected, upstream, q, k, v),
        strict=True,
    ):
        close(actual, wanted, FLOAT64_TOLERANCE, f"gradient of {what} of {case}")


@pytest.mark.parametrize(
    "name", [name for name in attnzoo.names() if attnzoo.describe(name).spec.attn_mask]
)
@settings(max_examples=25)
@given(call=calls(), data=st.data())
def test_any_attn_mask(
    name: str, call: tuple[Situation, torch.Tensor | None], data: st.DataObject
) -> None:
    """Bool and additive masks of every broadcastable shape, alone and with the others."""
    situation, key_mask = call
    full = (situation.batch, situation.heads, situation.query_length, situation.key_length)
    kept = data.draw(st.tuples(*[st.booleans()] * 4))
    shape = [size if keep else 1 for size, keep in zip(full, kept, strict=True)][
        data.draw(st.integers(0, 2)) :
    ]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    mask = torch.rand(shape, generator=generator) < 0.7
    if data.draw(st.booleans()):
        mask = torch.randn(shape, generator=generator, dtype=torch.float64).masked_fill(
            ~mask, float("-inf")
        )
    way = data.draw(st.sampled_from(attnzoo.describe(name).spec.forms))
    masks = {"key_mask": key_mask, "attn_mask": mask, "is_causal": way}
    q, k, v, _ = tensors(situation)
    for case, backend in with_backends([Case(name)]):
        attn = case.build(situation.heads, dtype=torch.float64, prefer=backend)
        out, a = ask_oracle(attn, q, k, v, **masks)
        close(attn(q, k, v, **masks), out, FLOAT64_TOLERANCE, f"{case} by {backend}")
        close(attn.weights(q, k, **masks), a, FLOAT64_TOLERANCE, f"weights of {case}")


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("feature_map", ["relu", "squared_relu"])
def test_a_row_whose_kernel_is_zero_everywhere_is_zero(
    feature_map: str, is_causal: bool, backend: str
) -> None:
    """A ReLU map can give a query no feature at all: its sum is 0, and 0/0 must not become NaN,
    forward or backward."""
    q, k, v, _ = (x.requires_grad_() for x in tensors(Situation(9, 9, kv_heads=4)))
    blind = torch.where(torch.arange(9)[:, None] == 4, -q.abs(), q)
    attn = Case("linear", {"feature_map": feature_map}).build(dtype=torch.float64, backend=backend)
    out = attn(blind, k, v, is_causal=is_causal)
    assert torch.equal(out[:, :, 4], torch.zeros_like(out[:, :, 4]))
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert bool(torch.isfinite(gradient).all())


def test_an_oracle_refuses_a_bias_that_does_not_reach() -> None:
    q = torch.randn(1, 1, 6, 4)
    for name in ("standard", "sigmoid"):
        with pytest.raises(ValueError, match=r"reaches 3 positions .* 4 away; give .heads, 9"):
            ORACLES[name](q, q, q, distance_bias=torch.randn(1, 7), is_causal=True)


def test_the_oracle_of_exact_attention_knows_sink_logits() -> None:
    q, k, v = (torch.randn(2, 4, 7, 8, dtype=torch.float64) for _ in range(3))
    given: dict[str, Any] = {"sink_logits": torch.randn(4, dtype=torch.float64), "is_causal": True}
    expected, a = ORACLES["standard"](q, k, v, **given)
    attn = attnzoo.build("standard", heads=4, head_dim=8)
    close(attn(q, k, v, **given), expected, 1e-12, "rows")
    close(attn.weights(q, k, **given), a, 1e-12, "A")
