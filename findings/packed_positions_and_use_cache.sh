#!/usr/bin/env bash
# Seen on 2026-11-29 with transformers 5.23.0 and torch 2.13.0 on a CPU. No other versions were tried.
#
# A packed row tells its documents by position_ids that start again (0 1 2 3 0 1 2 ...). transformers then gives sdpa and eager attention a
# block-diagonal mask, so that the logits of a row are those of its documents run apart. One would expect that neither an attention_mask of
# ones, which hides nothing, nor use_cache, which says what to return, changes that.
#
# Instead both do. With attention_mask=torch.ones(...) the documents see each other, and so they do without any mask unless
# use_cache=False is passed, since the default of the configuration is True and a call that makes a cache is not looked at for packing, in
# training mode too. Nothing warns.
#
# It bites who packs by position_ids and trains or evaluates without flash attention. Pass use_cache=False and no attention_mask. A model
# swapped by attnzoo keeps the documents apart in all of these calls, so its numbers differ from the plain model's where that leaks.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 numpy==2.4.6 || {
    echo "The packages could not be installed, so nothing was checked." >&2
    exit 2
}

cat > "$folder/finding.py" <<'PYTHON'
import sys
import warnings

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

warnings.filterwarnings("ignore")
print("torch", torch.__version__, "transformers", transformers.__version__)
tokens = torch.arange(10)[None] % 7
positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
ones = torch.ones(1, 10, dtype=torch.long)
CALLS = {
    "use_cache=False": ({"use_cache": False}, False),
    "use_cache=False, mask of ones": ({"use_cache": False, "attention_mask": ones}, True),
    "default": ({}, True),
}
as_seen = True
for implementation in ("sdpa", "eager"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=implementation,
    )
    model = LlamaForCausalLM(config)
    for training in (True, False):
        model.train(training)
        first, second = (model(part, use_cache=False).logits for part in (tokens[:, :4], tokens[:, 4:]))
        apart = torch.cat([first, second], 1)
        for call, (arguments, leaks) in CALLS.items():
            packed = model(tokens, position_ids=positions, **arguments).logits
            difference = (packed - apart).abs().max().item()
            print(f"{implementation}, {training=}, {call}: logits differ from the documents run apart by {difference:.2g}")
            as_seen &= (difference > 1e-3) == leaks
sys.exit(0 if as_seen else 1)
PYTHON
"$folder/venv/bin/python" "$folder/finding.py" || {
    echo "This is not what was seen." >&2
    exit 1
}
