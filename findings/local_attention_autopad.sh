#!/usr/bin/env bash
# Seen on 2026-11-30 with local-attention 1.11.2 and torch 2.13.0 on a CPU. No other version was tried.
#
# LocalAttention(autopad=True) takes a length that is no multiple of its window: it fills q, k and v up with zeros and cuts the rows off again. One would
# expect the rows to be those of the tokens that were given.
#
# Looking both ways (causal=False) the zeros are keys like others: they take their share of the softmax of the last rows. One token alone, which sees
# nothing but itself, gives a fraction of its own value. A mask of ones beside the call hides them, and the rows are right; so does causal=True.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 local-attention==1.11.2 || {
    echo "The packages could not be installed, so nothing was checked." >&2
    exit 2
}

cat > "$folder/finding.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from local_attention import LocalAttention

print("local-attention", version("local-attention"), "torch", torch.__version__)
torch.manual_seed(0)


def attention(causal):
    return LocalAttention(
        window_size=4,
        causal=causal,
        look_forward=0 if causal else 1,
        autopad=True,
        use_rotary_pos_emb=False,
    )


q, k, v = torch.randn(3, 1, 1, 1, 8).unbind()  # one token, which can see itself alone
both, masked = attention(False), torch.ones(1, 1, dtype=torch.bool)
share = (both(q, k, v) / v).mean().item()
print(f"one token, looking both ways: {share:.3f} of its own value")
print(f"with a mask of ones: {(both(q, k, v, mask=masked) / v).mean().item():.3f}")
print(f"causal: {(attention(True)(q, k, v) / v).mean().item():.3f}")
right = torch.allclose(both(q, k, v, mask=masked), v) and torch.allclose(attention(True)(q, k, v), v)
if share > 0.99 or not right:
    print("this is not what was seen on 2026-11-30")
    sys.exit(1)
print("as seen on 2026-11-30: zeros that fill a window up are read as keys")
PYTHON
"$folder/venv/bin/python" "$folder/finding.py"
