#!/usr/bin/env bash
# Seen on 2026-11-30 with torch 2.13.0 on a CPU. No other version was tried.
#
# The decay of Mamba-2 and of the gated delta rule is softplus of a linear layer, whose result is then laid out head by head: softplus(W x) of
# (batch, length, heads), transposed. One would expect such a layer to train under torch.compile as it does eagerly.
#
# Compiled with backend="aot_eager" its backward pass raises "view size is not compatible with input tensor's size and stride": the kernel of
# softplus's derivative lays its result out as the gradient is, and the shape function that a compiler traces with says as the input is. Where the two
# differ, as behind a transpose, the traced graph views what cannot be viewed. Of the derivatives tried (silu, sigmoid, tanh, mish, gelu, hardswish,
# softplus) hardswish's does the same. backend="inductor", which writes kernels of its own, is not concerned.
#
# -logsigmoid(-x) is the same function and compiles.
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
import torch.nn.functional as F
from torch import nn

print("torch", torch.__version__)


class Decay(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.project = nn.Linear(4, 3)
        self.function = function

    def forward(self, x):
        return self.function(self.project(x)).transpose(1, 2).contiguous()


def trains(function, backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = torch.compile(Decay(function), backend=backend)
    try:
        layer(torch.randn(2, 6, 4)).sum().backward()
    except RuntimeError as error:
        return str(error).splitlines()[0][:70]
    return "trains"


by_softplus = trains(F.softplus, "aot_eager")
by_logsigmoid = trains(lambda x: -F.logsigmoid(-x), "aot_eager")
eagerly = trains(F.softplus, "eager")
print("softplus, not compiled:  ", eagerly)
print("softplus, aot_eager:     ", by_softplus)
print("-logsigmoid(-x), the same:", by_logsigmoid)

x, gradient = torch.randn(2, 6, 4), torch.randn(2, 4, 6).transpose(1, 2)
kernel = torch.ops.aten.softplus_backward(gradient, x, 1.0, 20.0)
traced = torch.ops.aten.softplus_backward(
    torch.empty_strided(gradient.shape, gradient.stride(), device="meta"),
    torch.empty_strided(x.shape, x.stride(), device="meta"),
    1.0,
    20.0,
)
print("strides of the derivative:", kernel.stride(), "by the kernel,", traced.stride(), "traced")

as_seen = (
    eagerly == "trains"
    and by_softplus.startswith("view size is not compatible")
    and by_logsigmoid == "trains"
    and kernel.stride() != traced.stride()
)
print("As seen." if as_seen else "This is not what was seen.")
sys.exit(0 if as_seen else 1)
PYTHON
"$folder/venv/bin/python" "$folder/finding.py"
