#!/usr/bin/env bash
# From a checkout to results on a GPU box without network, in under 9 minutes. Has not run on a GPU yet.
#   benchmarks/cuda/run.sh WHEELS [OUT]     WHEELS: a folder of wheels (README.md says which); OUT: where results go
set -euo pipefail
cd "$(dirname "$0")/../.."
wheels=${1:?usage: benchmarks/cuda/run.sh WHEELS [OUT]}
out=${2:-benchmarks/results/cuda}
mkdir -p "$out"
end=$((SECONDS + 525)) # 15 seconds kept for what follows the last step

python3 -c 'import importlib.util as u, sys; u.find_spec("torch") or sys.exit("error: python3 has no torch here; run this on a GPU box")'
python3 -c 'import sys, torch; torch.cuda.is_available() or sys.exit("error: torch sees no CUDA device here; run this on a GPU box")'

# Beside the box's own packages and not over them: torch, triton and transformers stay what they are.
site=$(mktemp -d)
python3 -m pip install --quiet --no-index --no-deps --target "$site" "$wheels"/*.whl
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"

python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name())' | tee "$out/box.txt"
python3 benchmarks/cuda/limits.py --gpu "${GPU:-h100}" > "$out/limits.jsonl"

# The sweep puts its most telling rows first, checks each against the reference and appends it as it finishes: cut short, it is still of use.
# Both are interrupted, not ended: then pytest still writes which tests failed. What heeds no interrupt (a hanging kernel) is killed.
timeout --signal=INT --kill-after=10 $((end - SECONDS - 150)) python3 -m attnzoo bench --config configs/bench/cuda.yaml --output "$out/bench.jsonl" || echo "the sweep ended with $?"
timeout --signal=INT --kill-after=10 $((end - SECONDS)) python3 -m pytest -q -m cuda tests/test_cuda.py > "$out/tests.txt" 2>&1 || echo "the tests ended with $?"
tail -n 20 "$out/tests.txt"
