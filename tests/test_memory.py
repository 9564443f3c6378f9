"""No sub-quadratic variant forms an n × n tensor: 65,536 tokens, forward and backward, inside 2
GiB.

Each variant runs in a process of its own whose address space may grow by 2 GiB from where it stands
after importing torch (RLIMIT_AS): a hard limit that no allocator, thread or library can pass,
unlike a sampled resident size or a profiler that sees torch's allocator only. One n × n float32
matrix is 16 GiB and one of booleans 4 GiB, so either fails at once; that the limit bites is tested
too, by the reference backends that form one.
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

LENGTH = 65_536
LIMIT = 2 * 2**30
SUBQUADRATIC = [case for case in usual_cases() if "n²" not in case.spec.complexity]

RUN = """
import json, resource, sys
import torch, attnzoo
from attnzoo.registry import sized
torch.set_num_threads(1)
name, length, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def run(is_causal, backend):
    attn = attnzoo.build(name, heads=1, head_dim=64, backend=backend, **sized(name, length))
    q, k, v = (torch.randn(1, 1, length, 64, requires_grad=True) for _ in range(3))
    mask = torch.arange(length)[None] >= 100
    out = attn(q, k, v, key_mask=mask, is_causal=is_causal)
    out.square().sum().backward()
    return attn.last_backend

spec = attnzoo.describe(name).spec
kinds = spec.forms
for causal in kinds:  # what the first call sets up once and for all is not counted
    length, whole = 256, length
    run(causal, "auto")
    length = whole
pages = int(open("/proc/self/statm").read().split()[0])
allowed = pages * resource.getpagesize() + limit
resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
found = {}
for causal in kinds:
    for backend in ("auto", "reference"):
        try:
            found[f"{backend} {causal}"] = run(causal, backend)
        except (RuntimeError, MemoryError) as error:
            said = "out of memory" if "memory" in str(error) else repr(error)
            found[f"{backend} {causal}"] = said
print(json.dumps(found))
"""


def test_every_variant_but_the_exact_one_is_subquadratic() -> None:
    assert {case.variant for case in SUBQUADRATIC} == {
        name for name in attnzoo.names() if attnzoo.describe(name).spec.family != "exact"
    }


@pytest.mark.parametrize("case", SUBQUADRATIC, ids=[case.variant for case in SUBQUADRATIC])
def test_65536_tokens_in_2_gib(case: Case) -> None:
    """Defaults of the variant, one head of 64. Linformer's reference is n × rank, so it passes too;
    the others' must not."""
    command = [sys.executable, "-c", RUN, case.variant, str(LENGTH), str(LIMIT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    fast = {how: what for how, what in found.items() if how.startswith("auto")}
    assert fast
    assert not set(fast.values()) & {"out of memory"}, found
    assert set(fast.values()) <= set(case.build().engine.backend_names()) - {"reference"}, found
    reference = {what for how, what in found.items() if how.startswith("reference")}
    assert reference == ({"reference"} if case.spec.family == "low_rank" else {"out of memory"}), (
        found
    )
