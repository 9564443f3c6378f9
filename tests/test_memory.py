"""No sub-quadratic variant forms an n × n tensor: 32,768 tokens, forward and backward, inside 1
GiB, and 65,536 inside 2 with -m slow.

Each variant runs in a process of its own, forked from one that has imported torch, whose address
space may grow by so much from where it stands then (RLIMIT_AS): a hard limit that no allocator,
thread or library can pass, unlike a sampled resident size or a profiler that sees torch's allocator
only. One n × n float32 matrix is 4 GiB or 16, one of booleans 1 or 4, so either fails at once; that
the limit bites is tested too, by the reference backends that form one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cases import Case, usual_cases

import attnzoo

pytest.importorskip("resource", reason="RLIMIT_AS, which this test rests on, is POSIX's")
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(),
    reason="the size of the address space is read from Linux's /proc",
)

SUBQUADRATIC = [case for case in usual_cases() if "n²" not in case.spec.complexity]

RUN = """
import json, os, resource, sys
import torch, attnzoo
from attnzoo.registry import sized
torch.set_num_threads(1)
LENGTH, LIMIT, *NAMES = sys.argv[1:]

def run(name, length, is_causal, backend):
    attn = attnzoo.build(name, heads=1, head_dim=64, backend=backend, **sized(name, length))
    q, k, v = (torch.randn(1, 1, length, 64, requires_grad=True) for _ in range(3))
    mask = torch.arange(length)[None] >= 100
    out = attn(q, k, v, key_mask=mask, is_causal=is_causal)
    out.square().sum().backward()
    return attn.last_backend

def limited(name):
    forms = attnzoo.describe(name).spec.forms
    for causal in forms:  # what the first call sets up once and for all is not counted
        run(name, 256, causal, "auto")
    pages = int(open("/proc/self/statm").read().split()[0])
    allowed = pages * resource.getpagesize() + int(LIMIT)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    found = {}
    for causal in forms:
        for backend in ("auto", "reference"):
            try:
                found[f"{backend} {causal}"] = run(name, int(LENGTH), causal, backend)
            except (RuntimeError, MemoryError) as error:
                said = "out of memory" if "memory" in str(error) else repr(error)
                found[f"{backend} {causal}"] = said
    print(json.dumps([name, found]), flush=True)

for name in NAMES:
    if (child := os.fork()) == 0:
        limited(name)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"{name} ended with status {status}")
"""


def test_every_variant_but_the_exact_one_is_subquadratic() -> None:
    families = {name: attnzoo.describe(name).spec.family for name in attnzoo.names()}
    linear = {name for name, family in families.items() if family not in ("exact", "dense")}
    # An indexer scores every key, though in memory as long as the input, and nsa every block.
    assert {case.variant for case in SUBQUADRATIC} == linear - {"indexed", "nsa"}


@pytest.mark.parametrize(
    ("length", "limit"),
    [
        pytest.param(32_768, 2**30, marks=pytest.mark.thorough),
        pytest.param(65_536, 2**31, marks=pytest.mark.slow),
    ],
)
def test_tokens_in_little_memory(length: int, limit: int) -> None:
    """Defaults of every variant, one head of 64. Linformer's reference is n × rank, so it passes
    too; the others' must not."""
    by_name = {case.variant: case for case in SUBQUADRATIC}
    command = [sys.executable, "-c", RUN, str(length), str(limit), *by_name]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert result.returncode == 0, result.stderr
    answers = dict(json.loads(line) for line in result.stdout.splitlines())
    assert list(answers) == list(by_name)
    for name, found in answers.items():
        check(by_name[name], found)


def check(case: Case, found: dict[str, str]) -> None:
    fast = {how: what for how, what in found.items() if how.startswith("auto")}
    assert fast, case.variant
    assert not set(fast.values()) & {"out of memory"}, found
    assert set(fast.values()) <= set(case.build().engine.backend_names()) - {"reference"}, found
    reference = {what for how, what in found.items() if how.startswith("reference")}
    assert reference == ({"reference"} if case.spec.family == "low_rank" else {"out of memory"}), (
        found
    )
