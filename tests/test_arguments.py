"""Bad input gets one clear sentence: the argument, its value, what is allowed, and a way out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CPU_BACKENDS, Case, Situation, backends_of, takes, tensors, usual_cases
from small import cannot, possible, small
from torch import Tensor

import attnzoo
from attnzoo import UnsupportedError

CASES = pytest.mark.parametrize("case", usual_cases(), ids=str)
Change = Callable[[Tensor, Tensor, Tensor], dict[str, Any]]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """q (2, 4, 6, 8), k and v (2, 2, 6, 8), float32."""
    q, k, v, _ = (x.float() for x in tensors(Situation(6, 6)))
    return q, k, v


def says(error: pytest.ExceptionInfo[BaseException], *fragments: str) -> None:
    """The message is one line that holds every fragment."""
    message = str(error.value)
    assert "\n" not in message
    for fragment in fragments:
        assert re.search(fragment, message), f"{message!r} does not say {fragment!r}"


BAD_CALLS: dict[str, tuple[Change, list[str]]] = {
    "not a tensor": (
        lambda q, k, v: {"q": q.tolist()},
        [r"\bq\b.*list", "torch tensor", r"\(batch, heads, length, head_dim\)"],
    ),
    "q of rank 3": (
        lambda q, k, v: {"q": q[0]},
        [r"\bq\b.*\(4, 6, 8\)", "4 dimensions", r"\(batch, heads, length, head_dim\)"],
    ),
    "v of rank 5": (lambda q, k, v: {"v": v[None]}, [r"\bv\b.*\(1, 2, 2, 6, 8\)", "4 dimensions"]),
    "integer q": (
        lambda q, k, v: {"q": q.long()},
        [r"\bq\b.*torch\.int64", "floating", r"q\.float\(\)"],
    ),
    "integer k": (
        lambda q, k, v: {"k": k.int()},
        [r"\bk\b.*torch\.int32", "floating", r"k\.float\(\)"],
    ),
    "complex v": (
        lambda q, k, v: {"v": v.to(torch.complex64)},
        [r"\bv\b.*torch\.complex64", "floating"],
    ),
    "k of another dtype": (
        lambda q, k, v: {"k": k.double()},
        [r"\bk\b.*torch\.float64.*\bq\b.*torch\.float32", "agree", "convert"],
    ),
    "v of another dtype": (
        lambda q, k, v: {"v": v.half()},
        [r"\bv\b.*torch\.float16.*\bq\b.*torch\.float32", "agree", "convert"],
    ),
    "k on another device": (
        lambda q, k, v: {"k": k.to("meta")},
        [r"\bk\b.*meta.*\bq\b.*cpu", "one device"],
    ),
    "v on another device": (
        lambda q, k, v: {"v": v.to("meta")},
        [r"\bv\b.*meta.*\bq\b.*cpu", "one device"],
    ),
    "k of another batch": (
        lambda q, k, v: {"k": k[:1]},
        [r"\bk\b.*batch size 1.*\bq\b.*2", "agree"],
    ),
    "wrong number of heads": (lambda q, k, v: {"q": q[:, :3]}, [r"\bq\b.*3 heads", "heads=4"]),
    "k and v of different heads": (
        lambda q, k, v: {"v": v[:, :1]},
        [r"\bk\b.*2 heads.*\bv\b.*1", "agree"],
    ),
    "kv heads that do not divide": (
        lambda q, k, v: {"k": q[:, :3], "v": q[:, :3]},
        ["3 heads", "divide heads=4"],
    ),
    "no kv heads": (lambda q, k, v: {"k": k[:, :0], "v": v[:, :0]}, ["0 heads", "divide heads=4"]),
    "wrong head_dim of q": (lambda q, k, v: {"q": q[..., :5]}, [r"head_dim 5 and 8", "head_dim=8"]),
    "wrong head_dim of k": (lambda q, k, v: {"k": k[..., :5]}, [r"head_dim 8 and 5", "head_dim=8"]),
    "v of another length": (
        lambda q, k, v: {"v": v[:, :, :5]},
        [r"\bk\b.*length 6.*\bv\b.*length 5", "agree"],
    ),
    "float key_mask": (
        lambda q, k, v: {"key_mask": torch.ones(2, 6)},
        [r"key_mask.*torch\.float32", "bool", "True = attend", r"key_mask\.bool\(\)"],
    ),
    "integer key_mask": (
        lambda q, k, v: {"key_mask": torch.ones(2, 6).long()},
        [r"key_mask.*torch\.int64", "bool", "True = attend"],
    ),
    "key_mask of another shape": (
        lambda q, k, v: {"key_mask": torch.ones(2, 5).bool()},
        [r"key_mask.*\(2, 5\)", r"\(batch, key_length\) = \(2, 6\)"],
    ),
    "key_mask of four dimensions": (
        lambda q, k, v: {"key_mask": torch.ones(2, 1, 1, 6).bool()},
        [r"key_mask.*\(2, 1, 1, 6\)", r"\(2, 6\)"],
    ),
    "key_mask on another device": (
        lambda q, k, v: {"key_mask": torch.ones(2, 6, device="meta").bool()},
        [r"key_mask.*meta.*cpu", "one device"],
    ),
    "key_mask that is a list": (
        lambda q, k, v: {"key_mask": [[True] * 6] * 2},
        ["key_mask.*list", "tensor"],
    ),
    "attn_mask that is a list": (
        lambda q, k, v: {"attn_mask": [[True] * 6] * 6},
        ["attn_mask.*list", "tensor"],
    ),
    "integer attn_mask": (
        lambda q, k, v: {"attn_mask": torch.ones(6, 6).long()},
        [r"attn_mask.*torch\.int64", "bool", "float"],
    ),
    "attn_mask of another shape": (
        lambda q, k, v: {"attn_mask": torch.ones(6, 5).bool()},
        [r"attn_mask.*\(6, 5\)", r"broadcast.*\(2, 4, 6, 6\)"],
    ),
    "attn_mask of five dimensions": (
        lambda q, k, v: {"attn_mask": torch.ones(1, 1, 1, 6, 6).bool()},
        [r"attn_mask.*\(1, 1, 1, 6, 6\)", "broadcast"],
    ),
    "attn_mask on another device": (
        lambda q, k, v: {"attn_mask": torch.ones(6, 6, device="meta").bool()},
        [r"attn_mask.*meta.*cpu", "one device"],
    ),
}


@CASES
@pytest.mark.parametrize("bad", BAD_CALLS)
def test_bad_calls(case: Case, bad: str) -> None:
    change, fragments = BAD_CALLS[bad]
    q, k, v = inputs()
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v} | change(q, k, v)
    attn = case.build()
    with pytest.raises(ValueError) as error:  # noqa: PT011, the message is checked
        attn(**arguments)
    says(error, *fragments)
    if case.spec.decodes and not {"attn_mask"} & arguments.keys():
        with pytest.raises(ValueError) as error:  # noqa: PT011
            attn.step(
                arguments.pop("q"),
                arguments.pop("k"),
                arguments.pop("v"),
                attn.init_state(2, kv_heads=2),
                **arguments,
            )
        says(error, *fragments)


@CASES
def test_nothing_is_swallowed(case: Case) -> None:
    q, k, v = inputs()
    attn = case.build()
    with pytest.raises(ValueError, match=f"{attn.spec.name} has no input 'dropout_p'"):
        attn(q, k, v, dropout_p=0.1)
    with pytest.raises(TypeError):
        # Masks are given by name, for nobody agrees on their order.
        attn(q, k, v, torch.ones(2, 6).bool())


@CASES
def test_what_the_spec_excludes(case: Case) -> None:
    """UnsupportedError, which is a ValueError, names the variant, the feature, and who can
    instead."""
    q, k, v = inputs()
    attn, spec = case.build(), case.spec
    excluded: list[tuple[bool, dict[str, Any], list[str]]] = [
        (spec.causal, {"is_causal": True}, [spec.name, "causal", "standard"]),
        (spec.bidirectional, {"is_causal": False}, [spec.name, "is_causal=True", "standard"]),
        (
            spec.attn_mask,
            {"attn_mask": torch.ones(6, 6).bool()},
            [spec.name, "attn_mask", "key_mask", "standard"],
        ),
        (
            spec.cross,
            {"k": k[:, :, :5], "v": v[:, :, :5]},
            [spec.name, "query_length", "6 and 5", "standard"],
        ),
    ]
    for allowed, change, fragments in excluded:
        arguments = {"q": q, "k": k, "v": v, **possible(spec)} | change
        if allowed:
            attn(**arguments)
            continue
        with pytest.raises(UnsupportedError) as error:
            attn(**arguments)
        says(error, *fragments)
        del arguments["v"]
        with pytest.raises(UnsupportedError):
            attn.weights(**arguments)  # pyright: ignore[reportArgumentType]
    assert issubclass(UnsupportedError, ValueError)


@CASES
@pytest.mark.parametrize("option", ["heads", "head_dim"])
@pytest.mark.parametrize("value", [0, -2, 1.5, "8", None, True])
def test_sizes_are_whole_numbers(case: Case, option: str, value: Any) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        case.build(**{option: value})
    says(error, rf"{option}={re.escape(repr(value))}", "whole number of at least 1")


@CASES
def test_unknown_backend(case: Case) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        case.build(backend="cudnn")
    says(error, "backend='cudnn'", case.variant, "auto", *case.build().engine.backend_names())


BAD_OPTIONS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("standard", {"dropout": 1.0}, [r"dropout=1\.0", r"\[0, 1\)"]),
    ("standard", {"dropout": -0.1}, [r"dropout=-0\.1", r"\[0, 1\)"]),
    ("standard", {"dropout": "a"}, ["dropout='a'", r"\[0, 1\)"]),
    ("standard", {"scale": "a"}, ["scale='a'"]),
    ("standard", {"scale": float("nan")}, ["scale=nan"]),
    ("linformer", {"max_length": 0}, ["max_length=0", "at least 1"]),
    ("linformer", {"max_length": None}, ["max_length=None", "at least 1"]),
    ("linformer", {"rank": 0}, ["rank=0", "at least 1"]),
    ("linformer", {"sharing": "all"}, ["sharing='all'", "none, headwise, key_value, layerwise"]),
    ("linformer", {"scale": "a"}, ["scale='a'"]),
    (
        "linear",
        {"feature_map": "elo"},
        [
            "feature_map='elo'",
            "did you mean 'elu'",
            "relu, squared_relu, identity, taylor, softmax",
            "callable",
        ],
    ),
    ("linear", {"feature_map": 3}, ["feature_map=3", "callable"]),
    (
        "linear",
        {"feature_map": "softmax", "normalize": False},
        ["normalize=False", "feature_map='softmax'"],
    ),
    ("performer", {"num_features": 0}, ["num_features=0", "at least 1"]),
    ("performer", {"num_features": 2.5}, [r"num_features=2\.5", "whole number"]),
    (
        "performer",
        {"features": "positiv"},
        ["features='positiv'", "positive, hyperbolic, trigonometric, relu"],
    ),
    ("performer", {"scale": 0}, ["scale=0", "positive"]),
    ("performer", {"scale": -1.0}, [r"scale=-1\.0", "positive"]),
    ("performer", {"scale": "a"}, ["scale='a'"]),
    ("performer", {"scale": float("nan")}, ["scale=nan"]),
    ("performer", {"seed": "a"}, ["seed='a'"]),
    ("performer", {"seed": 1.5}, [r"seed=1\.5"]),
    ("performer", {"seed": 2**70}, [f"seed={2**70}"]),
    ("sliding_window", {"window": 0}, ["window=0", "at least 1"]),
    ("sliding_window", {"window": -3}, ["window=-3", "at least 1"]),
    ("sliding_window", {"window": 2.0}, [r"window=2\.0", "whole number"]),
    ("sliding_window", {"dropout": 2}, ["dropout=2", r"\[0, 1\)"]),
    ("bigbird", {"block_size": 0}, ["block_size=0", "at least 1"]),
    ("bigbird", {"num_window_blocks": 0}, ["num_window_blocks=0", "at least 1"]),
    ("bigbird", {"num_window_blocks": 4}, ["num_window_blocks=4", "odd"]),
    ("bigbird", {"num_random_blocks": -1}, ["num_random_blocks=-1", "at least 0"]),
    ("bigbird", {"num_global_blocks": -1}, ["num_global_blocks=-1", "at least 0"]),
    ("bigbird", {"num_global_blocks": 1.0}, [r"num_global_blocks=1\.0", "whole number"]),
    ("bigbird", {"seed": "a"}, ["seed='a'"]),
    ("bigbird", {"seed": 1.5}, [r"seed=1\.5"]),
    ("bigbird", {"seed": 2**70}, [f"seed={2**70}"]),
]


@pytest.mark.parametrize(
    ("variant", "options", "fragments"), BAD_OPTIONS, ids=[f"{v}-{o}" for v, o, _ in BAD_OPTIONS]
)
def test_bad_options(variant: str, options: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Case(variant, options).build()
    says(error, *fragments)


@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("variant", ["standard", "sliding_window"])
def test_a_scale_that_is_not_positive_hides_the_future_too(variant: str, scale: float) -> None:
    """torch's own causal SDPA makes NaN of it."""
    case = Case(variant, {"scale": scale})
    q, k, v = (torch.randn(1, 4, 12, 8, requires_grad=True) for _ in range(3))
    out, wanted = (
        case.build(dtype=torch.float32, prefer=backend)(q, k, v, is_causal=True)
        for backend in ("auto", "reference")
    )
    torch.testing.assert_close(out, wanted)
    for found, gradient in zip(
        torch.autograd.grad(out.sum(), (q, k, v)),
        torch.autograd.grad(wanted.sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(found, gradient)


@pytest.mark.parametrize("variant", ["standard", "linformer", "sliding_window", "bigbird"])
def test_a_scale_of_zero_means_zero(variant: str) -> None:
    """Every visible key weighs the same; 0 must not be taken for "not given"."""
    q, k, v = inputs()
    for backend in backends_of(Case(variant)):
        scores_off = Case(variant, {"scale": 0.0}).build(prefer=backend)
        torch.testing.assert_close(scores_off(q, k, v), scores_off(torch.zeros_like(q), k, v))


def test_layerwise_sharing() -> None:
    """One projection object for several layers, and nothing else in its place."""
    first = Case("linformer", {"rank": 4, "sharing": "layerwise"}).build()
    second = Case(
        "linformer", {"rank": 4, "sharing": "layerwise", "projection": first.key_projection}
    ).build()
    assert (
        second.key_projection
        is second.value_projection
        is first.key_projection
        is first.value_projection
    )
    for wrong in ({"rank": 5, "sharing": "layerwise"}, {"rank": 4, "sharing": "headwise"}):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            Case("linformer", {**wrong, "projection": first.key_projection}).build()
        says(error, "projection", "sharing='layerwise'", r"\(1, 1024, 4\)", wrong["sharing"])


@pytest.mark.parametrize(
    "case", [case for case in usual_cases() if case.spec.needs_max_length], ids=str
)
def test_longer_than_max_length(case: Case) -> None:
    q, k, v = inputs()
    attn = case.build(max_length=5)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        attn(q, k, v, **possible(case.spec))
    says(error, "key_length=6", "max_length=5", "larger max_length")


@pytest.mark.parametrize("case", [case for case in usual_cases() if case.spec.decodes], ids=str)
def test_bad_states(case: Case) -> None:
    q, k, v = inputs()
    attn = case.build()
    for arguments, fragments in (
        ({"batch_size": 0}, ["batch_size=0", "at least 1"]),
        ({"batch_size": 2, "max_length": 0}, ["max_length=0", "at least 1"]),
        ({"batch_size": 2, "max_length": 1.5}, [r"max_length=1\.5", "whole number"]),
        ({"batch_size": 2, "kv_heads": 3}, ["kv_heads=3", "divide heads=4"]),
        ({"batch_size": 2, "kv_heads": 0}, ["kv_heads=0", "at least 1"]),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            attn.init_state(**arguments)  # pyright: ignore[reportArgumentType]
        says(error, *fragments)
    state = attn.init_state(2, kv_heads=2)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        attn.step(q[:, :, :1], k, v, state)
    says(error, "1 quer", "6 keys")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        attn.step(q, k, v, attn.init_state(3, kv_heads=2))
    says(error, "batch_size=3", "batch size 2")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        attn.step(q, k, v, attn.init_state(2))
    says(error, "kv_heads=4", "2 heads", "init_state")


@CASES
def test_bad_costs(case: Case) -> None:
    attn = case.build()
    for arguments, fragments in (
        ((0, 6), ["batch_size=0"]),
        ((1, 0), ["query_length=0"]),
        ((1, 6, 0), ["key_length=0"]),
        ((1, 6.5), [r"query_length=6\.5"]),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            attn.cost(*arguments, **possible(case.spec))  # pyright: ignore[reportArgumentType]
        says(error, *fragments, "whole number of at least 1")
    for kv_heads, fragment in ((3, "divide heads=4"), (0, "kv_heads=0")):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            attn.cost(1, 6, kv_heads=kv_heads, **possible(case.spec))
        says(error, f"kv_heads={kv_heads}", fragment)
    for is_causal in (False, True):
        if not case.spec.runs(is_causal):
            with pytest.raises(UnsupportedError, match=cannot(case.variant, is_causal)):
                attn.cost(1, 6, is_causal=is_causal)


@pytest.mark.parametrize("case", usual_cases(), ids=str)
def test_a_backend_asked_for_by_name_never_falls_back(case: Case) -> None:
    """It runs, or refuses with its own name and reason."""
    q, k, v = inputs()
    ran = []
    for backend in case.build().engine.backend_names():
        attn = case.build(backend=backend)
        if takes(attn, backend, q, k, v, **possible(case.spec)):
            attn(q, k, v, **possible(case.spec))
            assert attn.last_backend == backend
            ran.append(backend)
            continue
        beginning = f"backend='{backend}' refuses this call: "
        with pytest.raises(UnsupportedError, match=beginning) as refusal:
            attn(q, k, v, **possible(case.spec))
        assert not str(refusal.value).removeprefix(beginning).startswith(f"{backend}:")
    assert "reference" in ran and len(ran) > 1 and set(ran) <= CPU_BACKENDS


def test_sdpa_says_why_it_refuses_a_mask_of_another_dtype() -> None:
    q, k, v = inputs()
    mask = torch.zeros(6, 6, dtype=torch.float64)
    with pytest.raises(UnsupportedError) as error:
        Case("standard").build(backend="sdpa")(q, k, v, attn_mask=mask)
    says(
        error, "backend='sdpa'", "attn_mask", r"torch\.float64", r"torch\.float32", "backend='auto'"
    )
    assert Case("standard").build()(q, k, v, attn_mask=mask).dtype == torch.float32


@pytest.mark.parametrize(
    "name", [name for name in attnzoo.names() if attnzoo.describe(name).spec.dropout]
)
def test_dropout_is_for_training_only(name: str) -> None:
    """In eval it does nothing; in training the output is unbiased and differs from call to call."""
    plain = Case(name).build(dtype=torch.float64)
    q, k, v, _ = tensors(Situation(20, 20))
    for backend in backends_of(Case(name)):
        attn = Case(name, {"dropout": 0.3}).build(dtype=torch.float64, prefer=backend)
        assert torch.equal(
            attn.eval()(q, k, v), Case(name).build(dtype=torch.float64, prefer=backend)(q, k, v)
        )
        assert not torch.equal(attn.train()(q, k, v), attn(q, k, v))
        draws = attn(*(x.repeat(144, 1, 1, 1) for x in (q, k, v))).unflatten(0, (144, 2))
        standard_error = draws.std(0) / 12 + 1e-9
        assert ((draws.mean(0) - plain(q, k, v)).abs() < 6 * standard_error).all()


def model() -> torch.nn.Module:
    return torch.nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True)


zoo: Any = attnzoo  # whose types would be told of before anything runs
#: What is given in the wrong place or of the wrong kind, and the sentence for it, which is never
#: Python's own.
MISPLACED: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: zoo.swap(model(), "sliding_window", {"window": 3}),
        "give options by name: attnzoo.swap(model, 'sliding_window', window=3)",
    ),
    (
        lambda: zoo.swap(model(), "sliding_window", layers={}),
        "layers={} is a mapping; give options by name",
    ),
    (
        lambda: zoo.swap(model(), ["linear"]),
        "name=['linear'] must be the name of an attention, or a mapping",
    ),
    (
        lambda: zoo.swap(model(), {0: ("linear", None)}),
        "('linear', None) must be the name of an attention or a pair",
    ),
    (lambda: zoo.swap("linear", model()), "model='linear' is no torch.nn.Module"),
    (
        lambda: zoo.build("standard", 8, 64, 3),
        "standard takes heads and head_dim without their names and got (8, 64, 3)",
    ),
    (lambda: zoo.build("standard", 8), "standard needs head_dim"),
    (lambda: zoo.build("standard", 8, 64, heads=4), "heads is given twice, 8 and 4"),
    (lambda: zoo.build("standard", "8", 64), "heads='8' must be a whole number"),
    (lambda: zoo.build(["standard"], 8, 64), "unknown attention ['standard']"),
    (lambda: zoo.describe({}), "unknown attention {}"),
    (lambda: zoo.MultiheadAttention(32, 4, attention=["linear"]), "unknown attention ['linear']"),
    (
        lambda: zoo.MultiheadAttention(32, 4, attention_options=["window"]),
        "attention_options=['window'] must be a mapping",
    ),
    (
        lambda: zoo.MultiheadAttention(32, 4, attention_options=3),
        "attention_options=3 must be a mapping",
    ),
    (
        lambda: zoo.MultiheadAttention(32, 4, attention_options={3: 3}),
        "attention_options={3: 3} must be a mapping",
    ),
    (lambda: zoo.load(model(), 3), "path=3 must be the path of a file"),
    (lambda: zoo.save(zoo.swap(model(), "linear"), None), "path=None must be the path of a file"),
]


@pytest.mark.parametrize(
    ("call", "sentence"), MISPLACED, ids=[sentence for _, sentence in MISPLACED]
)
def test_what_is_misplaced_is_told_in_a_sentence(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        call()


@pytest.mark.parametrize("name", attnzoo.names())
def test_heads_and_head_dim_need_no_names(name: str) -> None:
    assert repr(attnzoo.build(name, 4, 8, **small(name))) == repr(
        attnzoo.build(name, heads=4, head_dim=8, **small(name))
    )


@pytest.mark.parametrize("name", attnzoo.names())
def test_costs_of_absurd_lengths_are_refused(name: str) -> None:
    attn = attnzoo.build(name, heads=2, head_dim=8, **small(name))
    with pytest.raises(ValueError, match=rf"query_length={10**23} is above"):
        attn.cost(1, 10**23, is_causal=not attn.spec.bidirectional)
