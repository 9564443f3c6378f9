"""`attnzoo.bench`: time and memory of attentions beside exact SDPA, in sizes of your own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnzoo.arguments import nearest
from attnzoo.public.setting_checks import dtype_name, given, listed
from attnzoo.public.variant_text import Variant, parse_variant, written
from attnzoo.results.output import check_folder, open_results
from attnzoo.results.progress import progress_bar

if TYPE_CHECKING:
    import torch

    from attnzoo.benchmarking.bench_rows import Row
    from attnzoo.benchmarking.plan import Plan
    from attnzoo.report.result import Result
    from attnzoo.results.result_file import ResultFile

INTERRUPTED = "interrupted"  # how a result says that Ctrl-C ended it


def bench(
    variants: Variant | Iterable[Variant] | None = None,
    *,
    lengths: int | Iterable[int] | None = None,
    dtype: str | torch.dtype | Iterable[str | torch.dtype] | None = None,
    batch_size: int | Iterable[int] | None = None,
    heads: int | Iterable[int] | None = None,
    head_dim: int | Iterable[int] | None = None,
    levels: str | Iterable[str] | None = None,
    phases: str | Iterable[str] | None = None,
    causal: bool | Iterable[bool] | None = None,
    backends: str | Iterable[str] | None = None,
    segments: int | Iterable[int] | None = None,
    rounds: int | None = None,
    budget: float | None = None,
    device: str | torch.device | None = None,
    seed: int | None = None,
    config: str | Path | None = None,
    output: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """Measure time and memory of attentions beside exact SDPA, called directly, in the same rounds.

    Every combination of the settings is measured; each takes one value or several. What is not
    given is as `config` says and, without one, as `attnzoo.benchmarking.plan.Sweep` does.

    variants: such as "performer:num_features=64", ("performer", {"num_features": 64}), or a list;
    default: the whole zoo.
    lengths: tokens; default 1024.
    dtype: float32 (default), float64, bfloat16 or float16.
    batch_size, heads, head_dim: of q, k and v, default 1, 8 and 64.
    levels: core (default), multihead (with projections), layer (a whole pre-norm layer).
    phases: forward (default), forward+backward, decode (one more token).
    causal: default False.
    backends: by name, default auto.
    segments: equal pieces that a row is packed of, default 1.
    rounds: how often each contender is timed, default 7.
    budget: seconds a setting after which no new round is begun, default 10.
    device: cpu (default), cuda or cuda:INDEX.
    seed: of inputs and of every random choice, default 0.
    config: a YAML file of sweeps, or quick, cpu, gates or cuda of the shipped ones; the settings
    given beside it stand in the place of its own.
    output: a file that gets each row as soon as it is measured; what it holds is not measured
    again.
    progress: say on standard error what is measured.

    Ctrl-C and a lost CUDA device end it early, which `Result.interrupted` says.

    Raises ValueError, one sentence, before any work, on a setting that is not allowed, and on a
    file of another machine.
    """
    many = {
        "lengths": lengths,
        "batch_size": batch_size,
        "heads": heads,
        "head_dim": head_dim,
        "levels": levels,
        "phases": phases,
        "causal": causal,
        "backends": backends,
        "segments": segments,
    }
    settings = {name: listed(value) for name, value in many.items() if value is not None}
    if variants is not None:
        settings["variants"] = written(variants)
    if dtype is not None:
        settings["dtype"] = [dtype_name(one) for one in listed(dtype)]
    settings |= given(
        rounds=rounds, budget=budget, seed=seed, device=None if device is None else str(device)
    )
    return measure(prepare(settings, config, output), progress)


@dataclass(frozen=True)
class Bench:
    """What is about to be measured.

    file: gets the rows; None where nothing does.
    held: the rows that it has.
    facts: of this run, see `attnzoo.benchmarking.environment`.
    """

    plan: Plan
    device: torch.device
    file: ResultFile[Row] | None
    held: tuple[Row, ...]
    facts: dict[str, str]


def prepare(
    settings: dict[str, Any], config: str | Path | None, output: str | Path | None
) -> Bench:
    """Check everything that can be wrong. Raises ValueError as `bench` does.

    settings: by the names of `attnzoo.benchmarking.plan.SETTINGS`.
    """
    from attnzoo.benchmarking.bench_rows import check_one_machine
    from attnzoo.benchmarking.environment import environment
    from attnzoo.benchmarking.plan import read_plan
    from attnzoo.fidelity import check_device

    plan = read_plan(None if config is None else config_path(str(config)), settings)
    device = check_device(plan.device)
    for sweep in plan.sweeps:
        sweep.contenders(parse_variant)  # whatever is wrong with one is said before any work
    file = None if output is None else _open(str(output))
    held = [] if file is None else file.rows()
    facts = environment(seed=plan.seed, device=device)
    check_one_machine([facts], [row.environment for row in held], "this run", str(output))
    return Bench(plan, device, file, tuple(held), facts)


def measure(prepared: Bench, progress: bool = True) -> Result:
    """Measure what is missing: the rows of the plan, with those that the file had."""
    from attnzoo.benchmarking.cuda_timing import DeviceLost
    from attnzoo.benchmarking.heap import bounded_memory
    from attnzoo.benchmarking.sweep import planned, run_plan
    from attnzoo.report.bench.bench_page import bench_result

    plan, device = prepared.plan, prepared.device
    rows = {row.key: row for row in prepared.held}
    finished = {row.key for row in prepared.held if not row.is_late}
    cut = ""
    try:
        with bounded_memory(device), progress_bar(progress) as shown:
            for row in run_plan(plan, parse_variant, device, finished, shown):
                if prepared.file is not None:
                    prepared.file.append(row)
                rows[row.key] = row
    except KeyboardInterrupt:
        cut = INTERRUPTED
    except DeviceLost as error:
        cut = f"the device was lost ({error})"
    wanted = planned(plan, parse_variant)
    return bench_result([row for row in rows.values() if row.key in wanted], cut)


def config_path(text: str) -> Path:
    """A file, or one of the shipped configurations by its name. Raises ValueError when it is
    neither."""
    from attnzoo.configuration import configs_folder

    folder = configs_folder() / "bench"
    if Path(text).exists() or Path(text).suffix:
        return Path(text)
    shipped = sorted(path.stem for path in folder.glob("*.yaml"))
    if text not in shipped:
        raise ValueError(
            f"config {text!r} is no file{nearest(text, shipped)}; give a YAML file of sweeps, or "
            f"one of {', '.join(shipped)}"
        )
    return folder / f"{text}.yaml"


def _open(path: str) -> ResultFile[Row]:
    from attnzoo.benchmarking.bench_rows import Row

    if Path(path).is_dir():
        raise ValueError(
            f"output={path!r} is a folder; give a file such as {path}/bench.jsonl with --output"
        )
    check_folder(Path(path).parent)
    return open_results(Path(path), Row)
