#!/usr/bin/env bash
# Seen on 2026-11-29 with torch 2.13.0 on a CPU. No other version was tried.
#
# One would expect that a torch.nn.TransformerEncoder with dropout 0 that runs under torch.func.vmap with a src_key_padding_mask in training
# mode does so in eval mode too.
#
# Instead it raises in eval mode: "Batching rule not implemented for aten::_nested_tensor_from_mask_left_aligned". The encoder asks whether
# the padding is all on the right, to drop it by way of a nested tensor, with an operation that vmap does not know. It does so whether grad is
# wanted or not, and also where the mask is one for all. Without a mask, or with a TransformerEncoderLayer by itself, eval mode works.
#
# It bites who takes per-sample gradients of a torch encoder in eval mode, beside those of a swapped one. Make the encoder with
# enable_nested_tensor=False or call torch.backends.mha.set_fastpath_enabled(False), as checked here. To set enable_nested_tensor on an encoder
# that exists changes nothing: the encoder reads what it made of it at first.
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
import warnings

import torch
from torch import nn

warnings.filterwarnings("ignore")
torch.set_num_threads(2)
print("torch", torch.__version__)
ERROR = "Batching rule not implemented for aten::_nested_tensor_from_mask_left_aligned"

torch.manual_seed(0)
x = torch.randn(3, 2, 5, 16)
padding = torch.zeros(3, 2, 5, dtype=torch.bool)
padding[:, 1, 3:] = True
EACH, SHARED, NONE = (
    lambda module: torch.func.vmap(lambda a, p: module(a, src_key_padding_mask=p))(x, padding),
    lambda module: torch.func.vmap(lambda a: module(a, src_key_padding_mask=padding[0]))(x),
    lambda module: torch.func.vmap(module)(x),
)


def outcome(module, run):
    """Whether vmap gives what a loop gives at the tokens that are no padding, or what it raises."""
    try:
        out = run(module)
    except RuntimeError as error:
        return str(error).split(".")[0]
    wanted = torch.stack([module(a, src_key_padding_mask=None if run is NONE else p) for a, p in zip(x, padding, strict=True)])
    return "as a loop" if torch.allclose(out[~padding], wanted[~padding], atol=1e-5) else "other than a loop"


def layer():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)


def per_sample(module):
    """The norms of the gradients of each of three sequences, or what vmap raises."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters, a, p):
        return torch.func.functional_call(module, parameters, (a[None],), {"src_key_padding_mask": p[None]}).square().mean()

    try:
        grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x[:, 1], padding[:, 1])
    except RuntimeError as error:
        return str(error).split(".")[0]
    return f"gradients of {len(next(iter(grads.values())))} sequences"


saw = {}


def check(what, module, run, wanted):
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got = outcome(module, run)
        name = f"{what}, {'with' if grad else 'without'} grad"
        print(f"{name}: {got}")
        saw[f"{name}: {wanted}"] = got == wanted


encoder = nn.TransformerEncoder(layer(), 2)
for mode, wanted in (("training", "gradients of 3 sequences"), ("eval", ERROR)):
    got = per_sample(encoder.train(mode == "training"))
    print(f"per-sample gradients in {mode} mode: {got}")
    saw[f"per-sample gradients in {mode} mode: {wanted}"] = got == wanted
check("encoder in training mode, a mask each", encoder.train(), EACH, "as a loop")
check("encoder in eval mode, a mask each", encoder.eval(), EACH, ERROR)
check("encoder in eval mode, one mask for all", encoder, SHARED, ERROR)
check("encoder in eval mode, no mask", encoder, NONE, "as a loop")
check("layer in eval mode, a mask each", layer().eval(), EACH, "as a loop")
torch.backends.mha.set_fastpath_enabled(False)
check("encoder in eval mode without the fast path, a mask each", encoder, EACH, "as a loop")
torch.backends.mha.set_fastpath_enabled(True)
encoder.enable_nested_tensor = False
check("encoder in eval mode, enable_nested_tensor set to False, a mask each", encoder, EACH, ERROR)
made = nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False).eval()
check("encoder in eval mode, made with enable_nested_tensor=False, a mask each", made, EACH, "as a loop")

for what in (what for what, seen in saw.items() if not seen):
    print(f"This changed, it is no longer so: {what}.", file=sys.stderr)
sys.exit(not all(saw.values()))
PYTHON
"$folder/venv/bin/python" "$folder/finding.py"
