"""`attnzoo compare --model`: what it prints and writes, how it goes on after an interrupt, and one
sentence for whatever cannot be done."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jsonargparse")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from quality_models import Letters, part
from swap_models import make

from attnzoo.commands import program
from attnzoo.configuration import configs_folder
from attnzoo.engines.sparse import reference
from attnzoo.fidelity.pretrained import Pretrained
from attnzoo.public.variant_text import check_variant
from attnzoo.quality import model_kinds
from attnzoo.quality.quality_rows import Row
from attnzoo.quality.quality_study import read_study
from attnzoo.registry import names
from attnzoo.results.result_file import read_rows
from attnzoo.texts.text_parts import PARTS, PROSE, read_text


@pytest.fixture(autouse=True)
def _hidden_keys_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """On these short texts too, as they are on long ones: else windows and blocks would cost what
    exact attention costs, and no mix would be cheaper."""
    monkeypatch.setattr(reference, "SHORT", 0)


STUDY = """
texts: [one.txt, two.txt]
lengths: [16, 160]
sequences: 1
variants: {sliding_window: {window: [4, inf]}, linear: {}, linformer: {rank: 4}}
layers: {length: 160, variants: {sliding_window: {window: 4}}}
mixes: {tolerances: [0.01, 9], evaluations: 3, lengths: [160]}
""".replace("9]", "0.9]")
ENCODER_STUDY = (
    STUDY.replace("sequences: 1", "sequences: 12")
    .replace("16, 160", "40, 120")
    .replace("160", "120")
)


pytestmark = pytest.mark.usefixtures("quick_figures")


@pytest.fixture(autouse=True)
def tiny_models(tmp_path, monkeypatch):
    """An empty folder with two texts and two studies; smollm2 and minilm are tiny here."""
    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text(part(1, 240))
    Path("two.txt").write_text(part(2, 240))
    Path("study.yaml").write_text(STUDY)
    Path("encoder.yaml").write_text(ENCODER_STUDY)

    def load(name: str) -> Any:
        is_causal = name == model_kinds.NAMES["smollm2"]
        model = make(
            "llama" if is_causal else "bert",
            max_position_embeddings=256,
            attn_implementation="sdpa",
        )
        return Pretrained(name, is_causal, model, Letters())

    monkeypatch.setattr(model_kinds, "load", load)


def refused(capsys, *arguments: str) -> str:
    """The one sentence with which a command line is refused."""
    capsys.readouterr()  # what transformers said while a model was saved
    code = program.main(["compare", *arguments])
    captured = capsys.readouterr()
    said = [line for line in captured.err.strip().splitlines() if not line.startswith("[")]
    assert code == 2, captured
    assert captured.out == ""
    assert len(said) == 1 and said[0].startswith("attnzoo: ") and "Traceback" not in said[0], (
        captured.err
    )
    return said[0]


def test_a_causal_study_prints_tables_and_writes_rows_figures_and_a_page(capsys):
    assert program.main(["compare", "--model", "smollm2", "--study", "study.yaml"]) == 0
    captured = capsys.readouterr()
    for said in (
        "perplexity with every layer swapped",
        "one layer at a time",
        "cheapest mix",
        "linformer rank=4: ",
        "window=inf",
    ):
        assert said in captured.out
    assert "[0/" in captured.err and "done" in captured.err
    folder = Path("report")
    rows = read_rows(folder / "quality-smollm2-135m.jsonl", Row)
    assert {row.task for row in rows} == {"exact", "all", "layer", "search", "mix"}
    page = (folder / "quality-smollm2-135m.html").read_text()
    assert (
        page.count("<svg") == 5
        and "<script" not in page
        and "http" not in re.sub(r"http://www.w3.org\S*", "", page)
    )
    for figure in ("pareto", "length", "layers"):
        for ending in ("png", "svg"):
            assert (folder / f"quality-smollm2-135m-{figure}.{ending}").stat().st_size > 5000


def test_an_encoder_study_reports_cosine_and_retrieval(capsys):
    assert program.main(["compare", "--model", "minilm", "--study", "encoder.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "sentence embeddings" in printed and "top-10" in printed and "perplexity" not in printed
    assert "1 - cosine" in Path("report/quality-minilm-l6.html").read_text()


def test_the_same_command_again_measures_nothing_and_writes_the_same(capsys, monkeypatch):
    arguments = ["compare", "--model", "smollm2", "--study", "study.yaml"]
    assert program.main(arguments) == 0
    pages, rows = (
        Path("report/quality-smollm2-135m.html").read_text(),
        Path("report/quality-smollm2-135m.jsonl").read_text(),
    )
    monkeypatch.setattr(model_kinds, "load", None)
    assert program.main(arguments) == 0
    assert "rows, which are kept" in capsys.readouterr().err
    assert Path("report/quality-smollm2-135m.html").read_text() == pages
    assert Path("report/quality-smollm2-135m.jsonl").read_text() == rows


@pytest.mark.thorough
def test_an_interrupt_keeps_the_finished_rows_and_the_next_run_goes_on(capsys, monkeypatch):
    from attnzoo.quality.perplexity import CausalSubject

    measure, calls = CausalSubject.measure, []

    def interrupted(self: Any, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(self, *arguments)

    monkeypatch.setattr(CausalSubject, "measure", interrupted)
    arguments = ["compare", "--model", "smollm2", "--study", "study.yaml"]
    assert program.main(arguments) == 130
    captured = capsys.readouterr()
    assert (
        "goes on from there" in captured.err
        and "perplexity with every layer swapped" in captured.out
    )
    finished = read_rows("report/quality-smollm2-135m.jsonl", Row)
    assert len(finished) == 6  # exact and two variants, at two lengths
    file = Path("report/quality-smollm2-135m.jsonl")
    file.write_bytes(file.read_bytes()[:-30])
    monkeypatch.setattr(CausalSubject, "measure", measure)
    assert program.main(arguments) == 0
    assert "cut in the middle of its last line" in capsys.readouterr().err
    assert read_rows(file, Row)[:5] == finished[:5]


def test_variants_and_lengths_of_the_command_line_replace_the_studys(capsys):
    arguments = [
        "--model",
        "smollm2",
        "--study",
        "study.yaml",
        "--lengths",
        "24",
        "--variants",
        "performer:num_features=8",
    ]
    assert program.main(["compare", *arguments]) == 0
    rows = [row for row in read_rows("report/quality-smollm2-135m.jsonl", Row) if row.task == "all"]
    assert {(row.label, row.length) for row in rows} == {("performer num_features=8", 24)}


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_the_shipped_studies_can_be_read(kind):
    quick, full = (
        read_study(configs_folder() / "quality" / f"{kind}{ending}.yaml", check_variant)
        for ending in ("-quick", "")
    )
    assert (
        len(full.variants) > len(quick.variants)
        and full.mixes is not None
        and quick.mixes is not None
    )
    assert {choice.name for choice in full.variants} == set(names()) - {"standard"}


def test_a_variant_that_no_study_names_joins_at_its_defaults():
    Path("zoo.yaml").write_text(
        "texts: [one.txt]\nlengths: [16]\nsequences: 1\nvariants: {linear: {}}\nzoo: true\n"
    )
    found = read_study(Path("zoo.yaml"), check_variant).variants
    assert [choice.label for choice in found] == [
        "linear",
        *(name for name in names() if name not in ("linear", "standard")),
    ]


def test_prose_is_long_enough_and_its_parts_share_no_paragraph():
    parts = read_text(PROSE)
    paragraphs = [set(parts[part].split("\n\n")) for part in PARTS]
    assert all(len(text) > 30_000 for text in parts.values())
    assert (
        not paragraphs[0] & paragraphs[1]
        and not paragraphs[1] & paragraphs[2]
        and not paragraphs[0] & paragraphs[2]
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "smolm2"], r"unknown model 'smolm2' \(did you mean 'smollm2'\?\)"),
        (["--study", "full"], "--study goes with --model"),
        (["--model", "smollm2", "--layers", "3"], "--layers does not go with --model"),
        (["--model", "smollm2", "--models", "minilm"], "--models does not go with --model"),
        (
            ["--model", "smollm2", "--study", "ful"],
            r"there is no study 'ful' \(did you mean 'full'\?\); give quick or full, or the path",
        ),
        (
            ["--model", "smollm2", "--study", "study.yaml", "--variants", "perfomer"],
            "unknown attention 'perfomer'.*performer",
        ),
        (
            ["--model", "smollm2", "--study", "study.yaml", "--lengths", "300"],
            "length=300 is not one.*give 2 to 256",
        ),
        (["--model", "smollm2", "--study", "study.yaml", "--lengths", "0"], "length=0"),
        (
            ["--model", "smollm2", "--study", "study.yaml", "--seed", "-1"],
            "seed=-1 is out of range",
        ),
        (
            ["--model", "smollm2", "--study", "study.yaml", "--dtype", "int8"],
            "dtype='int8' is unknown",
        ),
    ],
)
def test_one_sentence_for_a_command_that_cannot_be_run(capsys, arguments, said):
    assert re.search(said, refused(capsys, *arguments))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "linear: {}",
            "linaer: {}",
            r"study study.yaml: unknown attention 'linaer' \(did you mean 'linear'\?\)",
        ),
        ("window: [4, inf]", "window: [0, inf]", "study study.yaml: .*window=0"),
        ("window: [4, inf]", "window: [wide]", "window='wide' must be int"),
        ("window: [4, inf]", "widow: 4", r"no option 'widow' \(did you mean 'window'\?\)"),
        ("lengths: [16, 160]", "lengths: []", "lengths is empty; list at least one value"),
        ("lengths: [16, 160]", "length: [16]", "unknown key 'length'"),
        (
            "[one.txt, two.txt]",
            "[shakespear]",
            r"unknown text 'shakespear' \(did you mean 'shakespeare'\?\)",
        ),
        (
            "sequences: 1",
            "sequences: 200",
            r"'one.txt' has [\d,]+ tokens in its part to be reported on, and 200 × 160 "
            r"are asked for",
        ),
        (
            "tolerances: [0.01, 0.9]",
            "tolerances: [5]",
            r"tolerances=\[5\] must be shares from 0 to 1",
        ),
        ("layers: {", "# layers: {", "mixes are made of what layers tried"),
        ("texts:", "texts: [", "not valid YAML"),
    ],
)
def test_one_sentence_for_a_study_that_cannot_be_meant(capsys, old, new, said):
    assert old in STUDY
    Path("study.yaml").write_text(STUDY.replace(old, new, 1))
    assert re.search(said, refused(capsys, "--model", "smollm2", "--study", "study.yaml"))


def test_one_sentence_for_a_file_that_holds_other_results(capsys):
    Path("report").mkdir()
    Path("report/quality-smollm2-135m.jsonl").write_text('{"format": "attnzoo.bench/1"}\n')
    assert "line 1 is no row of this version of `attnzoo compare --model`" in refused(
        capsys, "--model", "smollm2", "--study", "study.yaml"
    )


def test_one_sentence_for_a_folder_that_is_no_model(capsys):
    Path("empty").mkdir()
    assert "the folder 'empty' has no config.json" in refused(capsys, "--model", "empty")
    make("vit").save_pretrained("vision")
    assert (
        "'vision' holds ViTModel, which is neither a causal language model nor an encoder of text"
        in refused(capsys, "--model", "vision")
    )
    make("t5").save_pretrained("t5")
    assert "neither a causal language model nor an encoder" in refused(capsys, "--model", "t5")
    make("llama").save_pretrained("untold")
    # No tokenizer.
    assert "the model in '" in refused(capsys, "--model", "untold", "--study", "study.yaml")
    Path("untold/config.json").write_text("{")
    assert "the configuration in 'untold' cannot be read" in refused(capsys, "--model", "untold")


def test_a_folder_is_read_by_what_it_holds():
    for family, kind in (
        ("llama", "causal"),
        ("gpt2", "causal"),
        ("bert", "encoder"),
        ("modernbert", "encoder"),
    ):
        make(family).save_pretrained(family)
        assert model_kinds.find_model(family).kind == kind
