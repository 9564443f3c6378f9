#!/usr/bin/env bash
# Seen on 2026-11-30 with x-transformers 2.31.10 and torch 2.13.0 on a CPU. No other version was tried.
#
# Where four query heads share two key heads, torch's scaled_dot_product_attention(enable_gqa=True), transformers and the checkpoints of Llama and Mistral
# let neighbours share: heads 0 and 1 read key head 0. One would expect the same of x-transformers' Attend, so that weights of the one run in the other.
#
# Attend lets head h read key head h modulo 2: heads 0 and 2 share. Both are grouped-query attention, and a model that was trained with either runs with it;
# a checkpoint carried over runs without an error and gives other rows.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 x-transformers==2.31.10 || {
    echo "The packages could not be installed, so nothing was checked." >&2
    exit 2
}

cat > "$folder/finding.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
import torch.nn.functional as F
from x_transformers.attend import Attend

print("x-transformers", version("x-transformers"), "torch", torch.__version__)
torch.manual_seed(0)
q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
theirs = Attend(heads=4)(q, k, v)[0]
neighbours = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
alternating = F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))
print("as torch groups heads:", torch.allclose(theirs, neighbours, atol=1e-5))
print("head h with key head h modulo 2:", torch.allclose(theirs, alternating, atol=1e-5))
if torch.allclose(theirs, neighbours, atol=1e-5) or not torch.allclose(theirs, alternating, atol=1e-5):
    print("this is not what was seen on 2026-11-30")
    sys.exit(1)
print("as seen on 2026-11-30: other heads share than torch's")
PYTHON
"$folder/venv/bin/python" "$folder/finding.py"
