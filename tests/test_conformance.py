"""Rules and oracle over any callable: the zoo passes, what is known to be wrong is found and made
small, and every misuse is a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from small import build_small, of_each_family, small
from stages import only
from torch import Tensor

import attnzoo
from attnzoo.commands.program import main
from attnzoo.conformance import RULES, check
from attnzoo.conformance.judged_callable import Subject
from attnzoo.conventions.dialects.spoken import DIALECTS, find_dialect
from attnzoo.registry import Choice

pytest_plugins = ["pytester"]
QUICK = [
    rule.name for rule in RULES if rule.shrinks and rule.name not in ("odd lengths", "long inputs")
]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    diagonal: int = 1,
    fill: float = -torch.inf,
    scale: float | None = None,
) -> Tensor:
    """Attention as one writes it down, with places to go wrong at."""
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool)
        scores = scores.masked_fill(above.triu(diagonal + k.shape[2] - q.shape[2]), fill)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], fill)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("name", only(of_each_family(), attnzoo.names()))
def test_the_zoo_holds(name: str) -> None:
    torch.manual_seed(0)
    attn = build_small(name, 4, 8, 4096)
    options = {key: value for key, value in small(name, 4096).items() if key != "max_length"}
    report = check(attn, name, heads=4, head_dim=8, rules=QUICK, **options)
    assert report.holds, str(report)
    refused = [one.rule for one in report.findings if one.status == "refused"]
    assert not refused, str(report)


def test_costs_are_told() -> None:
    attn = attnzoo.build("sliding_window", heads=2, head_dim=8, window=16)
    report = check(
        attn, "sliding_window", heads=2, head_dim=8, rules=["memory growth", "MACs"], window=16
    )
    counted = attn.cost(1, 256, is_causal=True).macs
    assert f"causal: {counted:,} counted, {counted:,} here" in report.of("MACs").found
    power = float(report.of("memory growth").found.split("n^")[1][:3])
    assert power < 1.5
    dense = check(F.scaled_dot_product_attention, dialect="sdpa", rules=["MACs"])
    assert dense.of("MACs").found.startswith("2,097,152 counted; ")


@pytest.mark.thorough
def test_exact_attention_is_no_window_of_128() -> None:
    found = check(attend, "sliding_window", rules=["long inputs"], window=128).of("long inputs")
    assert found.status == "fails" and "129 tokens" in found.trial, found
    told = check(attend, "sliding_window", rules=["long inputs"], window=512).of("long inputs")
    assert told.status == "holds" and "window=512 leaves no key out" in told.found, told


def test_memory_steeper_than_that_of_a_fails() -> None:
    def cubic(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        held = torch.zeros(q.shape[2] ** 3 // 64)
        return attend(q, k, v) + held[0]

    assert check(cubic, rules=["memory growth"]).of("memory growth").status == "fails"


@pytest.mark.parametrize(
    ("function", "dialect"),
    [
        (F.scaled_dot_product_attention, "sdpa"),
        ("eager_attention_forward", "transformers"),
    ],
    ids=["sdpa", "transformers"],
)
def test_what_others_built_well_holds(function: Any, dialect: str) -> None:
    if isinstance(function, str):
        function = getattr(
            pytest.importorskip("transformers.models.llama.modeling_llama"), function
        )
    report = check(function, "standard", dialect=dialect)
    assert report.holds, str(report)
    assert not any(one.status == "refused" for one in report.findings), str(report)


def layer_of(kind: str, implementation: str, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    from importlib import import_module

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "attn_implementation": implementation}
    config = getattr(transformers, f"{kind}Config")(**sizes, **options)
    module = import_module(f"transformers.models.{kind.lower()}.modeling_{kind.lower()}")
    if kind == "Bert":
        return module.BertSelfAttention(config)
    return getattr(module, f"{kind}Attention")(config, 0)


LAYER_RULES = ["outputs", "gradients", "grouped heads", "causality", "alignment", "padding"]


@pytest.mark.parametrize(
    ("kind", "implementation", "options"),
    [("Llama", "eager", {"num_key_value_heads": 2}), ("Bert", "sdpa", {})],
)
def test_layers_of_transformers_hold(kind: str, implementation: str, options: Any) -> None:
    layer = layer_of(kind, implementation, **options)
    before = dict(layer.named_modules())
    how: dict[str, Any] = {"dialect": "transformers_layer", "rules": LAYER_RULES}
    report = check(layer, "standard", **how)
    assert report.holds and not any(one.status == "refused" for one in report.findings), str(report)
    assert report.of("grouped heads").status == ("holds" if options else "not applicable")
    assert dict(layer.named_modules()) == before
    layer.scaling *= 2
    found = check(layer, "standard", **how).of("outputs")
    heads = "4 heads over 2 of 8" if options else "4 heads of 8"
    assert found.status == "fails" and f"1 x 2 tokens, {heads}" in found.trial, found


def subject_of(function: Any, name: str, dialect: str = "attnzoo") -> Subject:
    return Subject(function, find_dialect(dialect), Choice(name), heads=2, head_dim=8)


@pytest.mark.parametrize("name", attnzoo.names())
def test_every_variant_is_seen_to_compute_in_float64(name: str) -> None:
    assert subject_of(build_small(name, 2, 8).double(), name).dtype == torch.float64


def test_final_states_are_compared_where_they_come_back() -> None:
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")

    def check_state(function: Any) -> Any:
        how: dict[str, Any] = {"dialect": "fla", "rules": ["outputs", "final state"]}
        return check(function, "gated_deltanet", l2_norm=False, **how).of("final state")

    rule = module.torch_chunk_gated_delta_rule
    assert subject_of(rule, "gated_deltanet", "fla").dtype == torch.float32  # whatever it is given
    assert check_state(rule).status == "holds"

    def early(query, key, value, g, beta, output_final_state=False):
        """The state before the last token."""
        rows, _ = rule(query, key, value, g, beta)
        before = (x[:, :-1] for x in (query, key, value, g, beta))
        return rows, rule(*before, output_final_state=True)[1] if key.shape[1] > 1 else None

    assert check_state(early).status == "fails" and "the final state" in check_state(early).found
    assert check_state(lambda q, k, v, g, beta: rule(q, k, v, g, beta)).status == "not applicable"
    assert check(wrong(), "standard", rules=["final state"]).of("final state").found == (
        "standard is no recurrence: it has no final state but all keys and values; leave "
        "output_final_state out"
    )


def wrong(**how: Any) -> Any:
    def function(q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> Tensor:
        return attend(q, k, v, **masks, **how)

    return function


def top_left(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def top_left_mask(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False) -> Tensor:
    """Aligned to the last key, until there are more queries than keys."""
    if q.shape[2] > k.shape[2]:
        return top_left(q, k, v, is_causal=is_causal)
    return attend(q, k, v, is_causal=is_causal)


def before_its_block(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False) -> Tensor:
    """Causal rows that read the blocks of two before their own alone."""
    if not is_causal:
        return attend(q, k, v)
    places = torch.arange(k.shape[2])
    seen = places // 2 < places[-q.shape[2] :, None] // 2
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def remembers(calls: list[Tensor]) -> Any:
    def function(q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> Tensor:
        calls.append(q)
        return attend(q, k, v, **masks) + 1e-3 * len(calls)

    return function


def mixes_batch(q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> Tensor:
    return attend(q, k, v, **masks) + 1e-3 * q.mean()


def in_place(q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> Tensor:
    rows = attend(q, k, v, **masks)
    with torch.no_grad():
        v.mul_(2)
    return rows


def multiples_of_four(q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> Tensor:
    missing = -k.shape[2] % 4
    return attend(q, *(F.pad(x, (0, 0, 0, missing)) for x in (k, v)))


def cut_off(q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> Tensor:
    return attend(q, k.detach(), v, **masks)


def wrong_far_on(q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> Tensor:
    return attend(q, k, v, **masks) * (1.01 if k.shape[2] >= 128 else 1.0)


def wrong_when_wide(q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> Tensor:
    return attend(q, k, v, **masks) * (1.01 if q.shape[3] >= 64 else 1.0)


def reads_storage(q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> Tensor:
    plain = torch.as_strided(q, q.shape, torch.empty(q.shape, device="meta").stride())
    return attend(plain, k, v, **masks)


def in_half(q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> Tensor:
    total = attend(q, k, v, **masks)
    return total if q.dtype.itemsize > 2 else (total * 256).round() / 256


@pytest.mark.parametrize(
    ("function", "rule", "smallest"),
    [
        (wrong(diagonal=2), "causality", "1 x 2 tokens, 1 head of 1"),
        (wrong(scale=1.0), "outputs", "1 x 2 tokens, 1 head of 2"),
        (wrong(fill=-4.0), "padding", ""),
        (wrong(fill=-1e9), "hidden rows", "mean of v"),
        (wrong(), "NaN in the future", "1 x 2 tokens"),
        (wrong(), "hidden rows", "not finite"),
        (top_left, "outputs", "1 query and 2 keys"),
        (top_left, "alignment", "1 query and 2 keys"),
        (top_left_mask, "alignment", "before the first token, reads token 0, where it should"),
        (before_its_block, "alignment", "reads no token, and not its own"),
        (wrong(diagonal=2), "alignment", "reads tokens 0, 1, some of which come after it"),
        (remembers([]), "determinism", ""),
        (mixes_batch, "batch invariance", "2 x 1 token,"),
        (in_place, "double use", "writes to v"),
        (multiples_of_four, "odd lengths", "1 x 1 token,"),
        (cut_off, "gradients", "gradient of k"),
        (in_half, "half precision", "times as much"),
        (wrong_far_on, "long inputs", "1 x 128 tokens"),
        (wrong_when_wide, "long inputs", "of 64"),
        (reads_storage, "memory layout", ""),
    ],
)
def test_what_is_wrong_is_found_and_made_small(function: Any, rule: str, smallest: str) -> None:
    report = check(function, "standard", rules=[rule])
    found = report.of(rule)
    assert found.status == "fails" and not report.holds, str(report)
    assert smallest in f"{found.found} {found.trial}", str(report)
    assert "seed 0" in found.trial


def test_packing_and_states_are_judged() -> None:
    attn = attnzoo.build("standard", heads=4, head_dim=8)

    class Forgetful(torch.nn.Module):
        init_state = staticmethod(attn.init_state)

        def forward(self, q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> Tensor:
            masks.pop("segments", None)
            return attn(q, k, v, **masks)

        def step(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any]:
            rows, after = attn.step(q, k, v, state)
            return rows, state if k.shape[2] == 1 else after

    report = check(Forgetful(), rules=["packing", "pieces and steps"], heads=4, head_dim=8)
    assert [one.status for one in report.findings] == ["fails", "fails"], str(report)

    class Lingering:
        """Takes back one token less than it is asked to."""

        def __init__(self, held: Any) -> None:
            self.held = held

        def crop(self, n: int) -> Lingering:
            return Lingering(self.held.crop(n - 1))

    class Slow(Forgetful):
        def init_state(self, *args: Any, **kwargs: Any) -> Lingering:
            return Lingering(attn.init_state(*args, **kwargs))

        def step(self, q: Tensor, k: Tensor, v: Tensor, state: Any) -> tuple[Tensor, Any]:
            rows, after = attn.step(q, k, v, state.held)
            return rows, Lingering(after)

    report = check(Slow(), rules=["pieces and steps", "going back"], heads=4, head_dim=8)
    assert [one.status for one in report.findings] == ["holds", "fails"], str(report)


def test_without_like_only_what_all_hold_to_is_asked() -> None:
    report = check(wrong(scale=1.0), rules=["outputs", "causality", "half precision"])
    assert [one.status for one in report.findings] == ["not applicable", "holds", "not applicable"]
    assert report.holds and "like=" in report.of("outputs").found


def test_a_module_keeps_its_mode() -> None:
    attn = attnzoo.build("standard", heads=4, head_dim=8, dropout=0.5).train()
    report = check(attn, "standard", heads=4, head_dim=8, rules=["outputs"])
    assert report.holds and attn.training


def test_every_number_of_key_heads_is_tried() -> None:
    groups: set[tuple[int, int]] = set()

    def function(q: Tensor, k: Tensor, v: Tensor, **masks: Any) -> Tensor:
        groups.add((q.shape[1], k.shape[1]))
        shared = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return attend(q, *shared, **masks)

    assert check(function, rules=["grouped heads"]).holds
    assert {(4, 2), (4, 1)} <= groups


def test_an_option_that_is_called_as_an_argument_goes_by_choice() -> None:
    attn = attnzoo.build("performer", 4, 8, num_features=16, seed=3)
    right, wrong = (Choice("performer", {"num_features": 16, "seed": seed}) for seed in (3, 4))
    for like, status in ((right, "holds"), (wrong, "fails")):
        report = check(attn, like, rules=["outputs"], heads=4, head_dim=8)
        assert report.of("outputs").status == status, str(report)


def test_json_and_junit() -> None:
    report = check(wrong(diagonal=2), "standard", rules=["causality", "packing", "determinism"])
    told = json.loads(report.to_json())
    assert told["holds"] is False and told["like"] == "standard"
    assert [one["status"] for one in told["findings"]] == ["fails", "refused", "holds"]
    suite = ElementTree.fromstring(report.to_junit())
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "1", "1")
    failure = suite.find("testcase/failure")
    assert failure is not None and "token 1" in failure.get("message", "")


def test_misuse() -> None:
    with pytest.raises(ValueError, match=r"give an instance of it"):
        check(torch.nn.Identity)
    with pytest.raises(ValueError, match=r"did you mean 'padding'"):
        check(attend, rules=["paddin"])
    with pytest.raises(ValueError, match=r"say which one with like="):
        check(attend, window=3)
    with pytest.raises(ValueError, match=r"did you mean 'sdpa'"):
        check(attend, dialect="sdpaa")
    with pytest.raises(ValueError, match=r"takes an attention layer .* got Identity: give"):
        check(torch.nn.Identity(), dialect="transformers_layer")
    with pytest.raises(ValueError, match=r"no option 'windw'.*did you mean 'window'"):
        check(attend, "sliding_window", windw=3)


def test_the_command(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "def attend(q, k, v, is_causal=False):\n"
        "    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v\n"
        "class Kind: pass\n"
    )
    few = ["--rules", "outputs", "causality", "--json", "out/found.json", "--junit", "found.xml"]
    assert main(["check", "mine.py:attend", "--like", "standard", *few]) == 4
    said = capsys.readouterr()
    assert "2 of 2 rules fail: outputs, causality" in said.out
    assert "attnzoo: causality" in said.err
    assert json.loads(Path("out/found.json").read_text())["holds"] is False
    assert ElementTree.parse("found.xml").getroot().get("failures") == "2"
    sdpa = "torch.nn.functional:scaled_dot_product_attention"
    assert main(["check", sdpa, "--dialect", "sdpa", "--rules", "causality"]) == 0
    assert "every rule that applies holds" in capsys.readouterr().out
    assert main(["check", "torch:abs", "--like", "standard", "--rules", "outputs"]) == 4
    told = " ".join(capsys.readouterr().out.split())
    assert (
        told.startswith("nothing could be checked: TypeError: abs()") and told.count(": Type") == 1
    )
    assert "it was called as attnzoo (f(q, k, v, is_causal=," in told and "--dialect" in told
    Path("taken").write_text("")
    assert main(["check", "mine.py:attend", "--json", "taken/found.json"]) == 2
    assert "json='taken' is a file; give a folder with --json" in capsys.readouterr().err
    mine = ["check", "mine.py:attend", "--like", "performer:seed=3", "--rules", "determinism"]
    assert main(mine) == 0
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    helped = " ".join(capsys.readouterr().out.split())
    assert f"{', '.join([*DIALECTS][:-1])} or {[*DIALECTS][-1]}" in helped
    for asked, said in {
        "mine.py:atend": "did you mean 'attend'?",
        "mine.py": "not of the form MODULE:NAME",
        "nowhere:attend": "nowhere cannot be imported: ModuleNotFoundError",
        "nowhere.py:attend": "nowhere.py is no file",
        "mine.py:Kind": "give an instance of it",
    }.items():
        assert main(["check", asked]) == 2
        assert said in capsys.readouterr().err


def test_the_fixture(pytester: pytest.Pytester) -> None:
    pytester.makeconftest('pytest_plugins = ["attnzoo.conformance.pytest_plugin"]')
    pytester.makepyfile(
        """
        import torch.nn.functional as F

        def test_right(attnzoo_conformance):
            attnzoo_conformance(
                F.scaled_dot_product_attention, "standard", dialect="sdpa", rules=["outputs"]
            )

        def test_wrong(attnzoo_conformance):
            attnzoo_conformance(lambda q, k, v: v, "standard", rules=["outputs"])
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*outputs*fails*"])
