#!/usr/bin/env bash
# Seen on 2026-11-30 with torch 2.13.0 on a CPU. No other version was tried.
#
# torch's FlopCounterMode counts torch.addmm and torch.baddbmm, and their forms with out=. One would expect it to count the same products where they are
# added in place, as kernels of linear attention do to carry a state on, and a transformer layer in evaluation as in training.
#
# It counts x.addmm_, x.baddbmm_, torch.mv and a triangular solve (the inside of every delta rule) as 0, and so does a whole
# nn.TransformerEncoderLayer in evaluation without gradients, which then is one fused operator. In training mode the layer is counted.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 || {
    echo "The packages could not be installed, so nothing was checked." >&2
    exit 2
}

cat > "$folder/finding.py" <<'PYTHON'
import sys

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

print("torch", torch.__version__)


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


a, b, state = torch.ones(2, 3, 5), torch.ones(2, 5, 7), torch.zeros(2, 3, 7)
triangle = torch.eye(5).expand(2, 5, 5)
layer, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(1, 10, 16)


def evaluated():
    with torch.no_grad():
        layer.eval()(x)


found = {
    "torch.baddbmm": counted(lambda: torch.baddbmm(state, a, b)),
    "x.baddbmm_": counted(lambda: state.baddbmm_(a, b)),
    "torch.addmm": counted(lambda: torch.addmm(state[0], a[0], b[0])),
    "x.addmm_": counted(lambda: state[0].addmm_(a[0], b[0])),
    "torch.mv": counted(lambda: torch.mv(a[0], torch.ones(5))),
    "solve_triangular": counted(lambda: torch.linalg.solve_triangular(triangle, b, upper=False)),
    "encoder layer, training": counted(lambda: layer.train()(x)),
    "encoder layer, evaluation": counted(evaluated),
}
for name, flops in found.items():
    print(f"{name}: {flops:,}")
zeros = {name for name, flops in found.items() if not flops}
seen = {"x.baddbmm_", "x.addmm_", "torch.mv", "solve_triangular", "encoder layer, evaluation"}
if zeros != seen or found["torch.baddbmm"] != 2 * 2 * 3 * 5 * 7:
    print("this is not what was seen on 2026-11-30")
    sys.exit(1)
print("as seen on 2026-11-30: products in place and fused layers count as nothing")
PYTHON
"$folder/venv/bin/python" "$folder/finding.py"
