"""The zoo's list, and that every word of a spec is true of what the variant does."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import subprocess
import sys

import pytest
import torch
from cases import Case, Situation, can, cases, tensors, usual_cases

import attnzoo
from attnzoo import Attention, Spec, registry
from attnzoo.engines.softmax.softmax import Softmax
from attnzoo.oracles import standard

VARIANTS = pytest.mark.parametrize("case", usual_cases(), ids=str)
ALL = pytest.mark.parametrize("case", cases(), ids=str)


def test_names_and_their_order() -> None:
    assert {"standard", "linformer", "performer", "linear", "sliding_window", "bigbird"} <= set(
        attnzoo.names()
    )
    assert attnzoo.names()[0] == "standard"
    assert attnzoo.names()[1:] == sorted(attnzoo.names()[1:])


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("performr", "performer"),
        ("big_bird", "bigbird"),
        ("slidingwindow", "sliding_window"),
        ("Linear", "linear"),
    ],
)
def test_an_unknown_name_gets_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"unknown attention '{wrong}' \(did you mean '{near}'\?\); the zoo has .*standard",
    ):
        attnzoo.build(wrong, heads=1, head_dim=4)
    with pytest.raises(ValueError, match=f"did you mean '{near}'"):
        attnzoo.describe(wrong)


def test_a_name_like_no_other_gets_the_list() -> None:
    with pytest.raises(
        ValueError, match=r"unknown attention 'qqqq'; the zoo has standard, bigbird, "
    ) as error:
        attnzoo.build("qqqq")
    assert "did you mean" not in str(error.value)


@VARIANTS
def test_an_unknown_option_gets_those_that_exist(case: Case) -> None:
    options = [option.name for option in attnzoo.describe(case.variant).options]
    with pytest.raises(
        ValueError,
        match=f"{case.variant} has no option 'head_dims'.*did you mean "
        f"'head_dim'.*{', '.join(options)}",
    ):
        attnzoo.build(case.variant, heads=1, head_dims=4)


@VARIANTS
def test_a_missing_option_is_named(case: Case) -> None:
    required = [option.name for option in attnzoo.describe(case.variant).options if option.required]
    with pytest.raises(ValueError, match=f"{case.variant} needs {' and '.join(required)}"):
        attnzoo.build(case.variant)


@VARIANTS
def test_describe(case: Case) -> None:
    """Everything a reader or a command line needs, without building the variant."""
    description = attnzoo.describe(case.variant)
    assert description.spec is case.build().spec
    for field in ("name", "title", "paper", "equation", "complexity"):
        assert getattr(description.spec, field)
    assert "O(" in description.spec.complexity
    assert description.spec.paper.startswith("no paper: ") or any(
        str(year) in description.spec.paper for year in range(2014, 2030)
    )
    assert len(description.text) > 200
    assert str(description).startswith(f"{case.variant}: {description.spec.title}\n")
    assert f"attnzoo.build('{case.variant}', heads, head_dim" in str(description)
    signature = inspect.signature(type(case.build()))
    assert [option.name for option in description.options] == list(signature.parameters)
    for option in description.options:
        assert (
            option.default is signature.parameters[option.name].default
            or option.default == signature.parameters[option.name].default
        )
        assert option.type
        explained = re.search(rf"\b{option.name}\b", description.text) or option.name in (
            "heads",
            "head_dim",
            "backend",
        )
        assert explained, f"the docstring of {case.variant} does not explain {option.name}"


def test_register(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new variant is one class; its name must be free."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    spec = dataclasses.replace(attnzoo.describe("standard").spec, name="own", title="A user's own")

    class Own(Attention):
        """Softmax at another temperature."""

        def __init__(
            self, heads: int, head_dim: int, *, temperature: float = 2.0, backend: str = "auto"
        ) -> None:
            super().__init__(heads, head_dim, Softmax(1 / temperature), backend=backend)

    Own.spec = spec
    assert attnzoo.register(Own) is Own
    assert attnzoo.register(Own) is Own  # the same class again: a reloaded notebook cell
    assert "own" in attnzoo.names()
    q, k, v, _ = tensors(Situation(7, 7))
    expected, _ = standard(q, k, v, scale=0.25)
    torch.testing.assert_close(
        attnzoo.build("own", heads=4, head_dim=8, temperature=4.0)(q, k, v), expected
    )

    class Other(Attention):
        pass

    Other.spec = spec
    with pytest.raises(ValueError, match=r"'own' is taken by .*Own.*another spec\.name"):
        attnzoo.register(Other)
    for wrong in (torch.nn.Linear, Attention, spec):
        with pytest.raises(ValueError, match="Attention subclass with a `spec`"):
            attnzoo.register(wrong)  # type: ignore[arg-type]


@VARIANTS
def test_a_spec_is_frozen(case: Case) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        case.spec.causal = not case.spec.causal  # type: ignore[misc]


def accepts(case: Case, **change: object) -> bool:
    """Does a call with this change run, or is it refused by the spec?"""
    q, k, v, _ = tensors(Situation(6, 6))
    arguments = {"q": q, "k": k, "v": v, "is_causal": not case.spec.bidirectional} | change
    try:
        case.build(dtype=torch.float64)(**arguments)
    except attnzoo.UnsupportedError:
        return False
    return True


@ALL
def test_flags_of_what_it_can_do(case: Case) -> None:
    spec: Spec = case.spec
    options = {option.name: option for option in attnzoo.describe(case.variant).options}
    _, k, v, _ = tensors(Situation(6, 5))
    assert accepts(case, is_causal=True) == spec.causal
    assert accepts(case, is_causal=False) == spec.bidirectional
    assert accepts(case, k=k, v=v) == spec.cross
    assert accepts(case, attn_mask=torch.ones(6, 6).bool()) == spec.attn_mask
    assert ("dropout" in options) == spec.dropout
    assert ("max_length" in options and options["max_length"].required) == spec.needs_max_length
    try:
        case.build().init_state(1)
    except attnzoo.UnsupportedError:
        assert not spec.decodes
    else:
        assert spec.decodes


@ALL
def test_exact_means_softmax_on_its_own_support(case: Case) -> None:
    """And what is not exact does differ there."""
    attn = case.build(dtype=torch.float64)
    q, k, _, _ = tensors(Situation(30, 30, kv_heads=4), shift=case.shift)
    scale = case.options.get("scale") or 8**-0.5
    for is_causal in (causal for causal in (False, True) if can(case.spec, causal)):
        a = attn.weights(q, k, is_causal=is_causal)
        scores = (scale * q @ k.mT).masked_fill(a == 0, float("-inf"))
        # A learned logit takes its share of every row, and a softcap changes scores: options that
        # leave softmax.
        leaves = {"sink_logits", "softcap"} & set(case.options)
        assert torch.allclose(a, scores.softmax(-1).nan_to_num(), atol=1e-9) == (
            case.spec.exact and not leaves
        )


@VARIANTS
def test_family(case: Case) -> None:
    """exact, dense: every key weighs something. sparse: most weigh nothing. kernel and low_rank:
    the rank of A is that of features or mixtures."""
    attn = case.build(1, dtype=torch.float64)
    q, k, _, _ = tensors(Situation(120, 120, heads=1, kv_heads=1, batch=1), shift=case.shift)
    if not case.spec.bidirectional:
        pytest.skip("a causal A is a triangle, of full rank and half zeros whatever its family")
    a = attn.weights(q, k)[0, 0]
    zeros, rank = (a == 0).double().mean().item(), int(torch.linalg.matrix_rank(a, rtol=1e-9))
    found = "sparse" if zeros > 0.4 else "low_rank or kernel" if rank < 60 else "exact or dense"
    assert case.spec.family in found


IMPORT = """
import json, sys
import torch, einops
before = set(sys.modules)
import attnzoo
attnzoo.names()
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_import_needs_torch_and_einops_only() -> None:
    """No other package, and none of torch's compilers."""
    result = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, timeout=120
    )
    modules = json.loads(result.stdout)
    packages = {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names)
    assert not [
        module for module in modules if module.startswith(("torch._dynamo", "torch._inductor"))
    ]
    assert packages <= {"attnzoo", "torch", "einops"}
