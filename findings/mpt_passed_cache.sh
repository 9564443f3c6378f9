#!/usr/bin/env bash
# Seen on 2026-11-29 with transformers 5.23.0 and torch 2.13.0 on a CPU. No other versions were tried.
#
# `generate` takes a cache to fill, generate(ids, past_key_values=DynamicCache()): one would expect the tokens of the same call without it, as every
# other model gives them, whose cache afterwards holds the prompt and the new tokens but the last.
#
# MPT gives other tokens, and its cache ends up many times longer than the text: use_cache is False in its configuration by default, for which every
# step passes all tokens again, while the cache that was given goes on being filled and read. A key is met once for every step since it came.
# Nothing warns until the keys outgrow max_seq_len. generate(..., use_cache=True) beside the cache is right.
#
# It bites who gives an MPT a cache of their own (quantized, static, a prompt's) as the documentation of caches shows it. Pass use_cache=True with it.
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
from transformers import BloomConfig, BloomForCausalLM, DynamicCache, MptConfig, MptForCausalLM

warnings.filterwarnings("ignore")
print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
sizes = {"vocab_size": 64, "initializer_range": 0.3}
models = {
    "MPT": MptForCausalLM(MptConfig(d_model=32, n_layers=2, n_heads=4, max_seq_len=512, **sizes)),
    "BLOOM": BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, **sizes)),
}
prompt, new = torch.arange(12)[None] * 5 % 64, 12
as_seen = True
for name, model in models.items():
    how = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = model.eval().generate(prompt, **how)
    for more in ({}, {"use_cache": True}):
        cache = DynamicCache()
        given = model.generate(prompt, past_key_values=cache, **how, **more)
        same, length = torch.equal(given, plain), cache.get_seq_length()
        print(f"{name}, {more}: the tokens are {'the same' if same else 'others'}; the cache holds {length} keys")
        wrong = name == "MPT" and not more
        as_seen &= same != wrong and (length > 10 * new if wrong else length == prompt.shape[1] + new - 1)
sys.exit(0 if as_seen else 1)
PYTHON
"$folder/venv/bin/python" "$folder/finding.py" || {
    echo "This is not what was seen." >&2
    exit 1
}
