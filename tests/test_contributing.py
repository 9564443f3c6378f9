"""The worked example of CONTRIBUTING.md, run as it is printed there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent

# In a process of its own: a variant registered here would be one that other tests do not expect.
COMPARE = """
import oracles, torch
import mean_variant, attnzoo

exec(open("mean_oracle.py").read(), vars(oracles))
q, k, v = torch.randn(3, 2, 4, 70, 8, dtype=torch.float64).unbind()
key_mask = torch.rand(2, 70) > 0.3
attn = attnzoo.build("mean", heads=4, head_dim=8)
for is_causal in (False, True):
    masks = {"key_mask": key_mask, "is_causal": is_causal}
    out, weights = oracles.ORACLES["mean"](q, k, v, **masks)
    torch.testing.assert_close(attn(q, k, v, **masks), out)
    torch.testing.assert_close(attn.weights(q, k, **masks), weights)
rows, _ = attn.step(q, k, v, attn.init_state(2), key_mask=key_mask)
torch.testing.assert_close(rows, attn(q, k, v, key_mask=key_mask, is_causal=True))
assert "mean" in attnzoo.names()
"""


def test_the_worked_example_equals_its_oracle(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (TESTS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for name, block in zip(("mean_variant.py", "mean_oracle.py"), blocks, strict=True):
        (tmp_path / name).write_text(block, encoding="utf-8")
    program = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(TESTS)!r}, {str(TESTS.parent)!r}]\n{COMPARE}"
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
