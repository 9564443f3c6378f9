"""Every variant goes through torch.compile(fullgraph=True), forward and backward, and says the same
as without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, Situation, can, close, gradients_of, padding, tensors, usual_cases
from small import in_models, of_each_engine, of_each_folder
from stages import only, staged
from torch import Tensor

import attnzoo
from attnzoo.variants.bigbird.random_blocks import hashed_uniform

RUNS = [
    (case, is_causal)
    for case in usual_cases()
    for is_causal in (False, True)
    if can(case.spec, is_causal)
]
KINDS = pytest.mark.parametrize(
    ("case", "is_causal"),
    [pytest.param(c, i, id=f"{c}-{'causal' if i else 'full'}") for c, i in RUNS],
)
#: In the first stage in one direction: that in which most can go wrong.
ONE_WAY = [(case, case.spec.forms[-1]) for case in usual_cases() if case.variant in in_models()]
#: And by one variant of each of the first folders of engines.
FEW = [(case, is_causal) for case, is_causal in ONE_WAY if case.variant in of_each_folder()[:3:2]]


def compare(case: Case, is_causal: bool, compiler: str, situations: list[Situation]) -> None:
    """Compiled against eager over several lengths, so that a dynamic graph is compiled as well."""
    torch._dynamo.reset()
    attn = case.build()
    compiled = torch.compile(attn, fullgraph=True, backend=compiler)
    for situation in (
        situation for situation in situations if can(case.spec, is_causal, situation)
    ):
        q, k, v, upstream = (x.float() for x in tensors(situation, shift=case.shift))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        masks = {"key_mask": situation.key_mask(), "is_causal": is_causal}
        expected, out = attn(*inputs, **masks), compiled(*inputs, **masks)
        close(out, expected, 1e-5, "output")
        if is_causal:
            shields_the_past(compiled, inputs, masks, expected)
        parameters = list(attn.parameters())
        wanted = gradients_of(expected, upstream, *inputs, *parameters)
        for i, (actual, gradient) in enumerate(
            zip(gradients_of(out, upstream, *inputs, *parameters), wanted, strict=True)
        ):
            close(actual, gradient, 1e-5, f"gradient {i}")


def shields_the_past(
    compiled: Any, inputs: list[Tensor], masks: dict[str, Any], expected: Tensor
) -> None:
    """A graph cannot look for NaN before it decides; rule 5 must hold in it all the same."""
    q, k, v = (x.detach().clone() for x in inputs)
    token = k.shape[2] - 9
    k[:, :, token], v[:, :, token] = float("nan"), float("inf")
    out = compiled(*(x.requires_grad_() for x in (q, k, v)), **masks)
    rows = max(token - (k.shape[2] - q.shape[2]), 0)
    close(
        out[:, :, : max(rows, 0)], expected[:, :, : max(rows, 0)], 1e-5, "rows before a bad token"
    )


def of_two_lengths(case: Case, is_causal: bool) -> bool:
    """Whether a second length is compiled: for causal calls alone, or where there are none, by one
    variant of each engine. `test_inductor_compiles_whole` has it for all."""
    return (is_causal or not case.spec.causal) and case.variant in of_each_engine()


#: In the first stage `test_compiles_whole` traces those of FEW, and other tests in whole layers and
#: models what is left out here: a half, in turn.
TRACED = [run for run in ONE_WAY if run not in FEW and run[0].variant in of_each_engine()][::2]


@pytest.mark.parametrize(("case", "is_causal"), only(TRACED, RUNS))
def test_traced_whole(case: Case, is_causal: bool) -> None:
    """By dynamo, and differentiated op by op: no graph break, with padding and grouped heads."""
    compare(case, is_causal, "eager", [Situation(150, 150, "interior")])


@pytest.mark.parametrize(
    ("case", "is_causal", "lengths"),
    [staged(*run, 1, first=run in FEW) for run in RUNS if run in FEW or not of_two_lengths(*run)]
    + [staged(*run, 2, first=False) for run in RUNS if of_two_lengths(*run)],
)
def test_compiles_whole(case: Case, is_causal: bool, lengths: int) -> None:
    """Traced by dynamo and differentiated by AOTAutograd, run op by op."""
    situations = [Situation(150, 150, "interior"), Situation(170, 170, "left")]
    compare(case, is_causal, "aot_eager", situations[:lengths])


@pytest.mark.parametrize(("case", "is_causal"), only(FEW[-1:], RUNS))
def test_a_compiled_causal_graph_shields_the_past(case: Case, is_causal: bool) -> None:
    """Without a mask too."""
    if not is_causal:
        return
    torch._dynamo.reset()
    attn = case.build()
    q, k, v, _ = (x.float() for x in tensors(Situation(40, 40), shift=case.shift))
    expected = attn(q, k, v, is_causal=True)
    k[:, :, 30], v[:, :, 30] = float("nan"), float("inf")
    out = torch.compile(attn, fullgraph=True, backend="eager")(q, k, v, is_causal=True)
    close(out[:, :, :30], expected[:, :, :30], 1e-5, "rows before the bad token")


@pytest.mark.slow
@KINDS
def test_inductor_compiles_whole(case: Case, is_causal: bool) -> None:
    compare(
        case,
        is_causal,
        "inductor",
        [Situation(150, 150, "interior"), Situation(170, 170, "left"), Situation(9, 170)],
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", attnzoo.names())
def test_inductor_trains_inside_a_layer(name: str) -> None:
    """Projections and attention in one graph: the loss falls as it does without compiling."""
    is_causal = not attnzoo.describe(name).spec.bidirectional
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        attn, project = Case(name).build(2, 8), torch.nn.Linear(16, 48)

        def loss(
            x: torch.Tensor, mask: torch.Tensor | None, attn=attn, project=project
        ) -> torch.Tensor:
            q, k, v = (
                part.unflatten(-1, (2, 8)).transpose(1, 2) for part in project(x).chunk(3, -1)
            )
            return (
                (attn(q, k, v, key_mask=mask, is_causal=is_causal).transpose(1, 2).flatten(2) - x)
                .square()
                .mean()
            )

        step = torch.compile(loss, fullgraph=True) if compiled else loss
        optimizer = torch.optim.Adam([*attn.parameters(), *project.parameters()], lr=1e-2)
        x, mask = torch.randn(2, 100, 16), padding("right", 2, 100)
        for _ in range(20):
            optimizer.zero_grad()
            value = step(x, mask)
            value.backward()
            optimizer.step()
        losses.append(value.item())
    assert abs(losses[0] - losses[1]) < 1e-3 * losses[0]
    assert losses[0] < 1.0


def test_inductor_draws_the_same_numbers() -> None:
    """Inductor folds arithmetic on positions into index expressions, where the products of a 64-bit
    hash would not wrap."""
    torch._dynamo.reset()

    def draw() -> torch.Tensor:
        heads, rows, index = torch.arange(4)[:, None, None], torch.arange(250), torch.arange(2)
        return hashed_uniform(2**40 + 3, heads, rows[:, None], index)

    assert torch.equal(torch.compile(draw, fullgraph=True)(), draw())


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_inductor_draws_the_same_random_blocks(is_causal: bool) -> None:
    torch._dynamo.reset()
    attn = Case("bigbird").build()

    def table() -> torch.Tensor:
        return attn.random_blocks(1000, 1000, is_causal) + 0  # type: ignore[operator]

    assert torch.equal(torch.compile(table, fullgraph=True)(), table())


@pytest.mark.parametrize("name", only(["standard"], ["standard", "sliding_window"]))
def test_causal_calls_of_two_lengths_without_a_mask(name: str) -> None:
    """Whether SDPA is to be causal is no symbol, though the length is one."""
    torch._dynamo.reset()
    attn = attnzoo.build(name, heads=4, head_dim=8)
    compiled = torch.compile(attn, backend="aot_eager", fullgraph=True)
    for length in (18, 77):
        q, k, v = (torch.randn(1, heads, length, 8) for heads in (4, 2, 2))
        expected = attn(q, k, v, is_causal=True)
        torch.testing.assert_close(compiled(q, k, v, is_causal=True), expected)
