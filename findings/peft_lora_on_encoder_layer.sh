#!/usr/bin/env bash
# Seen on 2026-11-29 with peft 0.21.2 and torch 2.13.0 on a CPU. No other versions were tried.
#
# One would expect that LoRA on linear1 and linear2 of torch.nn.TransformerEncoderLayer, or on its self_attn, once trained, changes what the
# model puts out in evaluation as it does in training.
#
# Instead the trained adapter does nothing after model.eval(). The layer's fast path hands the weights of its submodules to one fused
# operation and never calls them; PEFT answers to the name `weight` with the frozen base weight. Torch takes the fast path when no grad
# is wanted or no weight that it reads requires one, and under LoRA none of them does, so it is taken without torch.no_grad() too: the output
# in evaluation then does not even require grad. Nothing warns. (On out_proj alone LoRA does nothing in training mode either, since
# nn.MultiheadAttention reads that weight and never calls the layer; this is checked as well.)
#
# It bites who trains LoRA on a torch encoder and evaluates it, and who compares it with a model swapped by attnzoo: a swapped layer is kept
# off the fast path, so its adapter counts while the baseline's does not. Merge the adapter before evaluating (merge_and_unload), or call
# torch.backends.mha.set_fastpath_enabled(False).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6 || {
    echo "The packages could not be installed, so nothing was checked." >&2
    exit 2
}

cat > "$folder/finding.py" <<'PYTHON'
import sys
import warnings

import peft
import torch
from torch import nn

warnings.filterwarnings("ignore")
torch.set_num_threads(2)
print("torch", torch.__version__, "peft", peft.__version__)


def encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 1)


def effect(model, x):
    """The largest change that the adapter makes to the output."""
    with torch.no_grad():
        y = model(x)
        with model.disable_adapter():
            return (y - model(x)).abs().max().item()


saw = {}
model = peft.get_peft_model(encoder(), peft.LoraConfig(r=4, target_modules=["linear1", "linear2"]))
x, target = torch.randn(8, 5, 16), torch.randn(8, 5, 16)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
losses = []
for _ in range(40):
    loss = (model(x) - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"training: loss {losses[0]:.3f} before, {losses[-1]:.3f} after 40 steps")
saw["training lowers the loss"] = losses[-1] < 0.9 * losses[0]

in_training = effect(model, x)
model.eval()
in_evaluation = effect(model, x)
grad = model(x).requires_grad
torch.backends.mha.set_fastpath_enabled(False)
without_fast_path = effect(model, x)
torch.backends.mha.set_fastpath_enabled(True)
with torch.no_grad():
    stale = model(x)
    merged = (model.merge_and_unload()(x) - stale).abs().max().item()
print(f"effect of the adapter: {in_training:.3f} in training mode, {in_evaluation:.3f} in eval mode")
print(f"in eval mode: {without_fast_path:.3f} without the fast path; merging changes the output by {merged:.3f}; requires grad: {grad}")
saw["the adapter has an effect in training mode"] = in_training > 0.1
saw["it has none in eval mode"] = in_evaluation == 0
saw["the output in eval mode does not require grad"] = not grad
saw["without the fast path the adapter has its effect in eval mode"] = without_fast_path > 0.1
saw["merged, the adapter has its effect in eval mode"] = merged > 0.1

for target in ("self_attn", "out_proj"):
    model = peft.get_peft_model(encoder(), peft.LoraConfig(r=4, target_modules=[target], init_lora_weights=False))
    in_training, in_evaluation = effect(model.train(), x), effect(model.eval(), x)
    print(f"effect of a random adapter on {target}: {in_training:.3f} in training mode, {in_evaluation:.3f} in eval mode")
    if target == "self_attn":
        saw["on self_attn it has an effect in training mode"] = in_training > 0.1
    else:
        saw["on out_proj it has none in training mode"] = in_training == 0
    saw[f"on {target} it has none in eval mode"] = in_evaluation == 0

for what in (what for what, seen in saw.items() if not seen):
    print(f"This changed, it is no longer so: {what}.", file=sys.stderr)
sys.exit(not all(saw.values()))
PYTHON
"$folder/venv/bin/python" "$folder/finding.py"
