#!/usr/bin/env bash
# Seen on 2026-11-29 with transformers 5.23.0 and torch 2.13.0 on a CPU. No other versions were tried.
#
# output_attentions=True asks a model for its attention maps, and attn_implementation chooses who computes the same numbers. One would expect
# neither to change logits beyond rounding.
#
# Falcon's do. Without ALiBi (its default), a model loaded as usual, with "sdpa", answers output_attentions=True with other logits, and is no longer
# causal: the last token changes the logits of the tokens before it, and the maps weigh keys that come after the query. With ALiBi the logits of
# "eager", and of "sdpa" asked for maps, are those of slopes twice as steep: doubling the bias that "sdpa" adds gives them. Nothing warns.
#
# It bites who reads attention maps of a Falcon, or compares with them, and who trains or evaluates one with ALiBi in "eager". Ask for no maps and use
# "sdpa"; for maps of the rotary models load with attn_implementation="eager". attnzoo takes "sdpa" for what a Falcon computes.
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
from transformers import FalconConfig, FalconForCausalLM
from transformers.models.falcon import modeling_falcon

warnings.filterwarnings("ignore")
print("torch", torch.__version__, "transformers", transformers.__version__)
tokens = torch.arange(12)[None]
changed = tokens.clone()
changed[0, -1] = 50


def model(alibi: bool, implementation: str) -> FalconForCausalLM:
    config = FalconConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        alibi=alibi,
        multi_query=False,
        parallel_attn=False,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return FalconForCausalLM._from_config(config, attn_implementation=implementation).eval()


@torch.no_grad()
def logits(of: FalconForCausalLM, ids: torch.Tensor, maps: bool) -> torch.Tensor:
    return of(ids, output_attentions=maps).logits


as_seen = True
rotary = {name: model(False, name) for name in ("sdpa", "eager")}
for name, of in rotary.items():
    for maps in (False, True):
        leak = (logits(of, tokens, maps) - logits(of, changed, maps))[:, :-1].abs().max().item()
        off = (logits(of, tokens, maps) - logits(rotary["eager"], tokens, False)).abs().max().item()
        print(f"rotary, {name}, {maps=}: another last token changes earlier logits by {leak:.2g}; off by {off:.2g}")
        as_seen &= (leak > 0.1 and off > 0.1) == (name == "sdpa" and maps)

with_alibi = {name: model(True, name) for name in ("sdpa", "eager")}
once = logits(with_alibi["sdpa"], tokens, False)
build = modeling_falcon.build_alibi_tensor
modeling_falcon.build_alibi_tensor = lambda *arguments, **more: 2 * build(*arguments, **more)
twice = logits(with_alibi["sdpa"], tokens, False)
modeling_falcon.build_alibi_tensor = build
for name, maps in (("eager", False), ("eager", True), ("sdpa", True)):
    found = logits(with_alibi[name], tokens, maps)
    off, off_from_twice = ((found - wanted).abs().max().item() for wanted in (once, twice))
    print(f"ALiBi, {name}, {maps=}: off by {off:.2g} from sdpa, by {off_from_twice:.2g} from sdpa with twice the bias")
    as_seen &= off > 0.01 and off_from_twice < 1e-4
sys.exit(0 if as_seen else 1)
PYTHON
"$folder/venv/bin/python" "$folder/finding.py" || {
    echo "This is not what was seen." >&2
    exit 1
}
