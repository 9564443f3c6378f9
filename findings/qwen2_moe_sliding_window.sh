#!/usr/bin/env bash
# Seen on 2026-11-29 with transformers 5.23.0 and torch 2.13.0 on a CPU. No other versions were tried.
#
# One would expect that Qwen2MoeConfig treats sliding_window as Qwen2Config does: None where use_sliding_window is off, and where it is on,
# the same attention whichever attention function runs.
#
# Instead, where use_sliding_window is off (the default), sliding_window becomes 0, not None, so `config.sliding_window is not None` takes the
# model for one with a window, of no keys. Where it is on, the window is in the mask of the sliding layers, but the layers do not pass
# sliding_window to the attention function, as Qwen2's do. "sdpa" and "eager" read the mask and slide. A function that is given no mask and
# goes by the keyword, which is how transformers calls flash attention, attends to every earlier key: from the first token past the window on
# its output differs. The script registers such a function in plain torch; flash attention itself was not run, for want of a GPU.
#
# It bites who brings an attention function of their own to a Qwen2-MoE with windows, and who reads the window from the config. attnzoo.swap
# refuses such a model with a sentence rather than swap its layers without the window. Run it with "sdpa" or "eager", or leave
# use_sliding_window off, and test `config.use_sliding_window` rather than `sliding_window is not None`.
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

import torch
import transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

torch.set_num_threads(2)
transformers.utils.logging.set_verbosity_error()
print("torch", torch.__version__, "transformers", transformers.__version__)

WINDOW, TOKENS = 4, 12
SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
EXPERTS = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 2, "num_experts_per_tok": 1}
given = []


def by_keyword(module, query, key, value, mask, scaling=None, **settings):
    """Causal attention with the window of the keyword, given no mask, as transformers calls flash attention."""
    assert mask is None
    given.append(settings.get("sliding_window", "nothing"))
    i = torch.arange(query.shape[2])
    keep = i[:, None] >= i
    if settings.get("sliding_window") is not None:
        keep &= i[:, None] - i < settings["sliding_window"]
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=keep, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("by_keyword", by_keyword)
ALL_MASK_ATTENTION_FUNCTIONS.register("by_keyword", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])


def differing(model_class, config, implementation):
    """The tokens at which this implementation's output is another than that of sdpa."""
    outs = []
    for each in (implementation, "sdpa"):
        torch.manual_seed(0)
        model = model_class._from_config(config, attn_implementation=each).eval()
        with torch.no_grad():
            outs.append(model(torch.arange(TOKENS)[None], use_cache=False).last_hidden_state[0])
    return [i for i, d in enumerate((outs[0] - outs[1]).abs().amax(-1).tolist()) if d > 1e-4]


saw = {}
moe, dense = (c(sliding_window=WINDOW, **SMALL) for c in (transformers.Qwen2MoeConfig, transformers.Qwen2Config))
print(f"sliding_window={WINDOW}, use_sliding_window left off: Qwen2MoeConfig has {moe.sliding_window}, Qwen2Config {dense.sliding_window}")
saw["Qwen2MoeConfig turns the window into 0 where use_sliding_window is off"] = moe.sliding_window == 0 and moe.sliding_window is not None
saw["Qwen2Config turns it into None"] = dense.sliding_window is None

SLIDING = {"sliding_window": WINDOW, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}
moe, dense = transformers.Qwen2MoeConfig(**SLIDING, **SMALL, **EXPERTS), transformers.Qwen2Config(**SLIDING, **SMALL)
for name, model_class, config, window, tokens in (
    ("Qwen2Moe", transformers.Qwen2MoeModel, moe, "nothing", list(range(WINDOW, TOKENS))),
    ("Qwen2", transformers.Qwen2Model, dense, WINDOW, []),
):
    given.clear()
    eager, keyword = differing(model_class, config, "eager"), differing(model_class, config, "by_keyword")
    print(f"{name}, window {config.sliding_window}: its layers pass {given} as sliding_window")
    print(f"    tokens at which the output is not sdpa's: eager {eager}, by the keyword {keyword}")
    saw[f"{name}'s layers pass {window} on as sliding_window"] = given == [window] * 2
    saw[f"{name} by eager is as by sdpa"] = eager == []
    saw[f"{name} by the keyword differs from sdpa at the tokens {tokens}"] = keyword == tokens

for what in (what for what, seen in saw.items() if not seen):
    print(f"This changed, it is no longer so: {what}.", file=sys.stderr)
sys.exit(not all(saw.values()))
PYTHON
"$folder/venv/bin/python" "$folder/finding.py"
