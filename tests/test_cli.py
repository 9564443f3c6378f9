"""The command line: what it prints and writes, and one clear sentence for whatever cannot be
done."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("jsonargparse")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import attnzoo
import attnzoo.fidelity
from attnzoo.commands import program
from attnzoo.commands.command import _console
from attnzoo.fidelity import LENGTHS, Comparison
from attnzoo.public.run_compare import MODELS
from attnzoo.public.variant_text import parse_variant
from attnzoo.registry import Choice

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL = [
    "compare",
    "--models",
    "synthetic",
    "--lengths",
    "16",
    "48",
    "--variants",
    "standard",
    "linear",
    "sliding_window:window=8",
]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch, quick_figures):
    monkeypatch.chdir(tmp_path)


def refused(capsys, *arguments: str) -> str:
    """The one sentence with which a command line is refused."""
    code = program.main(list(arguments))
    captured = capsys.readouterr()
    said = captured.err.strip().splitlines()
    assert code == 2, captured
    assert captured.out == ""
    assert len(said) == 1 and said[0].startswith("attnzoo: ") and "Traceback" not in said[0], (
        captured.err
    )
    return said[0]


def write(name: str, text: str | bytes) -> str:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def test_list_prints_every_variant(capsys):
    assert program.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in attnzoo.names())
    assert all(
        name in printed
        for name in (
            "KV caching",
            "gradient checkpointing",
            "grouped-query attention",
            "recurrent layer",
        )
    )
    assert "\x1b" not in printed


@pytest.mark.parametrize("name", attnzoo.names())
def test_show_prints_equation_paper_options_and_cost(capsys, name):
    assert program.main(["show", name]) == 0
    printed = capsys.readouterr().out
    described = attnzoo.describe(name)
    unwrapped = " ".join(printed.split())  # a narrow terminal wraps the equation
    assert described.spec.equation in unwrapped and "reference" in printed and "16,384" in printed
    assert all(option.name in printed for option in described.options)
    assert all(word in printed for word in described.spec.paper.split())


def test_version_and_help(capsys):
    for arguments, expected in (
        (["--version"], attnzoo.__version__),
        (["--help"], "compare"),
        (["compare", "--help"], "--lengths"),
    ):
        with pytest.raises(SystemExit) as stop:
            program.main(arguments)
        assert stop.value.code == 0 and expected in capsys.readouterr().out


def test_list_and_help_import_nothing_heavy():
    code = (
        "import sys; from attnzoo.commands.program import main; main(['list']); print([m for m in "
        "('matplotlib', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CONFIGS.parent
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["bench", "compare", "train", "scaling", "flops", "check"])
def test_the_first_line_comes_before_torch(command):
    """A stand-in for torch that says when it is imported."""
    Path("torch.py").write_text("print('torch is here'); raise KeyboardInterrupt")
    arguments = {"train": ["--task", "copy"], "flops": ["linear"], "check": ["json:dumps"]}
    code = (
        "import sys; sys.stderr = sys.stdout; from attnzoo.commands.program import main; "
        f"main({[command, *arguments.get(command, [])]!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", str(CONFIGS.parent)])},
    )
    assert done.stdout.splitlines()[:2] == [f"attnzoo {command}: loading torch", "torch is here"]


def test_options_may_be_written_as_in_python():
    parsed = program.make_parser().parse_args(
        [
            program._dashed(text)
            for text in ("bench", "linear", "--head_dim=16", "--batch_size", "2")
        ]
    )
    assert parsed.bench.head_dim == [16] and parsed.bench.batch_size == [2]
    assert parsed.bench.variant == ["linear"]


def test_variants_given_twice_are_refused(capsys):
    assert "variants are given twice" in refused(
        capsys, "compare", "linear", "--variants", "performer"
    )


def test_the_help_says_the_lengths_and_models_that_are_the_default(capsys):
    with pytest.raises(SystemExit):
        program.main(["compare", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"(default: {' '.join(map(str, LENGTHS))};" in printed
    assert f"(default: {' '.join(MODELS)})" in printed


def test_compare_writes_page_json_and_figures(capsys):
    assert program.main([*SMALL, "--output", "here/deeper"]) == 0
    captured = capsys.readouterr()
    found = {path.name for path in Path("here/deeper").iterdir()}
    assert {
        "compare.html",
        "compare.json",
        "compare-error-macs.png",
        "compare-error-macs.svg",
        "compare-error-length.svg",
    } <= found
    text = Path("here/deeper/compare.json").read_text()
    comparison = Comparison.from_json(text)
    assert comparison.to_json() + "\n" == text
    assert {row.label for row in comparison.rows} == {
        "standard",
        "linear",
        "sliding_window window=8",
    }
    assert {row.length for row in comparison.rows} == {48}
    assert "score standard deviation" in captured.out and "baseline" in captured.out
    assert "\x1b" not in captured.out + captured.err
    assert all(f"wrote here/deeper/{name}" in captured.out for name in found)


def test_an_interrupt_writes_what_is_finished(capsys, monkeypatch):
    compare = attnzoo.fidelity.compare

    def interrupted(*arguments, progress, **options):
        def stop(stage: str, done: int, total: int) -> None:
            if done == 5:
                raise KeyboardInterrupt
            progress(stage, done, total)

        return compare(*arguments, progress=stop, **options)

    monkeypatch.setattr(attnzoo.fidelity, "compare", interrupted)
    assert program.main(SMALL) == 130
    assert "interrupted" in capsys.readouterr().err
    written = Comparison.read("report/compare.json")
    assert len(written.rows) >= 3 and "interrupted" in written.environment
    assert Path("report/compare.html").read_text().endswith("</html>\n")


def test_an_interrupt_before_any_result_writes_nothing(capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(attnzoo.fidelity, "load_samples", interrupted)
    assert program.main(["compare"]) == 130
    assert capsys.readouterr().err.strip().endswith("interrupted")
    assert list(Path("report").iterdir()) == []


def test_missing_models_are_replaced_and_said(capsys, monkeypatch):
    drawn = {"matplotlib": find_spec("matplotlib")}
    monkeypatch.setattr("attnzoo.packages.find_spec", drawn.get)
    assert program.main(["compare", "--lengths", "32", "--variants", "standard", "linear"]) == 0
    said = capsys.readouterr().err
    assert "pip install" in said and "standard deviation 1" in said and "measured" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compar"], ["'compar'", "'compare'", "list"]),
        (["list", "extra"], ["'extra'"]),
        (["show"], ["name is missing"]),
        (["show", "perfomer"], ["'perfomer'", "'performer'", "standard"]),
        (["compare", "--legnths", "3"], ["'--legnths'", "'--lengths'"]),
        (["compare", "--lengths", "0"], ["length=0", "at least 1"]),
        (["compare", "--lengths", "many"], ["lengths", "many", "whole number"]),
        (["compare", "--lengths", "9000"], ["length=9000", "8,192", "512", "synthetic"]),
        (["compare", "--models", "minilm", "--lengths", "513"], ["length=513", "512"]),
        (["compare", "--models", "minlm"], ["'minlm'", "'minilm'"]),
        (["compare", "--seed", "x"], ["seed", "x", "whole number"]),
        (["compare", "--seed", "-1"], ["seed=-1", "0 to"]),
        (["compare", "--dtype", "float23"], ["'float23'", "float32", "bfloat16"]),
        (["compare", "--device", "gpu"], ["'gpu'", "cpu"]),
        (["compare", "--variants", "perfomer"], ["'perfomer'", "'performer'"]),
        (
            ["compare", "--variants", "performer:num_feature=3"],
            ["'num_feature'", "'num_features'", "orthogonal"],
        ),
        (["compare", "--variants", "performer:num_features=many"], ["num_features='many'", "int"]),
        (["compare", "--variants", "performer:num_features=0"], ["num_features=0", "at least 1"]),
        (["compare", "--variants", "performer:orthogonal=3"], ["orthogonal=3", "bool"]),
        (["compare", "--variants", "performer:features=cosine"], ["'cosine'", "positive"]),
        (["compare", "--variants", "sliding_window:window=true"], ["window=True", "int"]),
        (["compare", "--variants", "sliding_window:window"], ["'window'", "option=value"]),
        (["compare", "--variants", "sliding_window:heads=2"], ["heads", "model", "window"]),
    ],
    ids=" ".join,
)
def test_a_request_that_cannot_be_met_gets_one_sentence(capsys, arguments, words):
    said = refused(capsys, *arguments)
    assert all(word in said for word in words), said
    assert not Path("report").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there(capsys):
    said = refused(capsys, "compare", "--device", "cuda")
    assert "device='cuda' is not there" in said and "use cpu" in said


def test_an_output_that_cannot_be_written_is_refused_before_the_run(capsys):
    write("taken", "")
    assert "'taken' is a file" in refused(capsys, *SMALL, "--output", "taken")
    assert "cannot be written" in refused(capsys, *SMALL, "--output", "taken/below")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lenghts: [16]\n", ["'lenghts'", "'lengths'", "seed"]),
        ("lengths: 16\n", ["lengths", "list", "[16]"]),
        ("lengths:\n", ["lengths has no value"]),
        ("lengths: [16, many]\n", ["lengths", "many", "whole number"]),
        ("lengths: [16\nseed: ", ["not valid YAML", "line 2", "half-written"]),
        ("variants: [perfomer]\n", ["'perfomer'", "'performer'"]),
        ("", ["empty", "lengths"]),
        ("- 1\n", ["list", "lengths"]),
        (b"\xff\xfe\x00", ["not a text file"]),
    ],
    ids=[
        "misspelt",
        "scalar",
        "no value",
        "not a number",
        "half-written",
        "variant",
        "empty",
        "list",
        "binary",
    ],
)
def test_a_config_with_a_mistake(capsys, text, words):
    said = refused(capsys, "compare", "--config", write("run.yaml", text))
    assert all(word in said for word in words), said


def test_a_config_that_cannot_be_read(capsys):
    assert "missing.yaml cannot be read: No such file" in refused(
        capsys, "compare", "--config", "missing.yaml"
    )
    assert ". cannot be read: Is a directory" in refused(capsys, "compare", "--config", ".")


def settings_of(*arguments: str) -> dict:
    found = program.make_parser().parse_args(["compare", *arguments])["compare"].as_dict()
    del found["config"]
    return found


def test_the_default_config_is_the_default_run():
    # By the run: with --model they have other defaults.
    settled = {"lengths": list(LENGTHS), "models": list(MODELS)}
    assert settings_of("--config", str(CONFIGS / "compare.yaml")) == {**settings_of(), **settled}


def test_an_argument_overrides_the_config():
    quick = settings_of("--config", str(CONFIGS / "compare-quick.yaml"), "--seed", "7")
    assert quick["seed"] == 7 and quick["layers"] == [3]
    assert [parse_variant(text).name for text in quick["variants"]] == [
        "standard",
        "linear",
        "linformer",
        "performer",
        "sliding_window",
        "bigbird",
    ]


def test_variants_are_read_as_yaml_scalars():
    assert parse_variant("standard") == Choice("standard")
    read = parse_variant(
        "performer:num_features=64,features=hyperbolic,orthogonal=false,scale=1e-1"
    )
    assert read == Choice(
        "performer",
        {"num_features": 64, "features": "hyperbolic", "orthogonal": False, "scale": 0.1},
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_on_a_terminal_and_none_with_no_color(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for no_color, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        stream = Terminal()
        _console(stream).print("lost", style="bold red")
        assert ("\x1b" in stream.getvalue()) == coloured


def test_a_fault_of_ours_is_a_sentence_that_names_a_file(capsys, monkeypatch, tmp_path):
    def faulty(arguments):
        raise KeyError("surprise")

    monkeypatch.setattr(program, "run", faulty)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert program.main(["list"]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "KeyError" in said
    report = next(tmp_path.glob("attnzoo-*.txt"))
    assert str(report) in said and "Traceback" in report.read_text()


def test_a_missing_extra_is_named(capsys, monkeypatch):
    def missing(arguments):
        raise ModuleNotFoundError("No module named 'rich'", name="rich.console")

    monkeypatch.setattr(program, "run", missing)
    assert program.main(["list"]) == 2
    assert "pip install 'attnzoo[cli]'" in capsys.readouterr().err


@pytest.mark.parametrize("length", [20_000_000_000, 10**14])
def test_too_little_memory_is_a_sentence(length: int, capsys):
    assert (
        program.main(
            ["compare", "--models", "synthetic", "--lengths", str(length), "--variants", "linear"]
        )
        == 2
    )
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"attnzoo: there is not enough memory for this: [\d,.]+ GiB at once; give "
        r"shorter --lengths, .*",
        said,
    )


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m attnzoo show standard | head -1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
        cwd=CONFIGS.parent,
    )
    assert "Traceback" not in done.stderr and done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_models_limits_are_those_of_the_models(name):
    from attnzoo.fidelity.pretrained import load
    from attnzoo.packages import MissingPackageError

    try:
        pretrained = load(MODELS[name].title)
    except MissingPackageError as error:
        pytest.skip(str(error))
    assert pretrained.max_length == MODELS[name].max_length


def test_every_option_of_the_help_can_be_given_with_either_mark(capsys):
    for command in program.commands():
        with pytest.raises(SystemExit):
            program.main([command.name, "--help"])
        told = re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE)
        parser = program.make_parser()._subcommands_action.choices[command.name]  # pyright: ignore
        known = {name for action in parser._actions for name in action.option_strings}
        for option in told:
            for spelt in (option, "--" + option[2:].replace("-", "_")):
                assert program._dashed(spelt) in known, (command.name, spelt)


@pytest.mark.parametrize("option", ["--print_config", "--print-config"])
def test_the_configuration_is_printed(option, capsys):
    with pytest.raises(SystemExit):
        program.main(["compare", "--lengths", "64", "--seed=3", option])
    assert "seed: 3" in capsys.readouterr().out


def test_a_default_is_told_once(capsys):
    with pytest.raises(SystemExit):
        program.main(["bench", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "null" not in told and "type: " not in told
    assert "--rounds ROUNDS how often each attention is timed (default: 7) --budget" in told
    with pytest.raises(SystemExit):
        program.main(["check", "--help"])
    assert "of all random numbers (default: 0) --json" in " ".join(capsys.readouterr().out.split())
