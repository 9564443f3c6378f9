#!/usr/bin/env bash
# Seen on 2026-11-29 with transformers 5.23.0 and torch 2.13.0 on a CPU. No other versions were tried.
#
# One would expect that generate(cache_implementation="static") with a CompileConfig of fullgraph=True and dynamic=False compiles the
# decoding step once, for nothing changes its shape: that is what a static cache is for, and a Llama does so.
#
# Instead a model with a sliding window (Mistral, Gemma 2) compiles anew for every token. The static cache of a windowed layer counts its
# tokens in a Python integer, and torch guards on its value. At the ninth graph, the tenth new token, torch's limit is reached and generate
# raises torch._dynamo.exc.FailOnRecompileLimitHit. The window need not be near: here it is 4096 and the text has 15 tokens.
#
# It bites who compiles the generation of a swapped Mistral or Gemma 2 and takes this for the swap's doing: the models here are not swapped.
# Leave `dynamic` unset (two graphs), or, where no text is longer than the window, set
# config.sliding_window = None before the model is made (Mistral: one graph). Both are checked here.
#
# The backend "eager" keeps this quick: it traces and guards as the default does but generates no code. transformers compiles on a CPU only
# where `_compile_all_devices` says so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 numpy==2.4.6 || {
    echo "The packages could not be installed, so nothing was checked." >&2
    exit 2
}

cat > "$folder/finding.py" <<'PYTHON'
import logging
import sys

import torch
import torch._dynamo
import transformers
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

torch.set_num_threads(2)
torch._logging.set_logs(dynamo=logging.CRITICAL)
transformers.utils.logging.set_verbosity_error()
print("torch", torch.__version__, "transformers", transformers.__version__, "recompile_limit", torch._dynamo.config.recompile_limit)

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
SMALL |= {"head_dim": 8, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def generate(family, new, compiling, **options):
    """How many graphs it takes, and how it ends."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, **options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    compiling = transformers.CompileConfig(backend="eager", mode=None, fullgraph=True, **compiling)
    compiling._compile_all_devices = True
    ids, settings = torch.arange(2, 7)[None], {"max_new_tokens": new, "do_sample": False}
    wanted = model.generate(ids, use_cache=False, **settings)
    try:
        out = model.generate(ids, cache_implementation="static", compile_config=compiling, **settings)
        end = "right tokens" if torch.equal(out, wanted) else "other tokens than without a cache"
    except FailOnRecompileLimitHit:
        end = "FailOnRecompileLimitHit"
    return counters["stats"]["unique_graphs"], end


saw = {}
for family, new, compiling, options, wanted in (
    ("Llama", 10, {"dynamic": False}, {}, (1, "right tokens")),
    ("Mistral", 9, {"dynamic": False}, {}, (8, "right tokens")),
    ("Mistral", 10, {"dynamic": False}, {}, (8, "FailOnRecompileLimitHit")),
    ("Gemma2", 9, {"dynamic": False}, {}, (8, "right tokens")),
    ("Gemma2", 10, {"dynamic": False}, {}, (8, "FailOnRecompileLimitHit")),
    ("Mistral", 10, {}, {}, (2, "right tokens")),
    ("Gemma2", 10, {}, {}, (2, "right tokens")),
    ("Mistral", 10, {"dynamic": False}, {"sliding_window": None}, (1, "right tokens")),
):
    what = ", ".join([family, *(f"{k}={v}" for k, v in {**options, "dynamic": "unset", **compiling}.items()), f"{new} new tokens"])
    graphs, end = generate(family, new, compiling, **options)
    print(f"{what}: {graphs} graphs, {end}")
    saw[f"{what} takes {wanted[0]} graphs and ends with {wanted[1]}"] = (graphs, end) == wanted

for what in (what for what, seen in saw.items() if not seen):
    print(f"This changed, it is no longer so: {what}.", file=sys.stderr)
sys.exit(not all(saw.values()))
PYTHON
"$folder/venv/bin/python" "$folder/finding.py"
