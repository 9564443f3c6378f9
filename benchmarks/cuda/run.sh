#!/usr/bin/env bash
# From a checkout to results on a GPU box without network, in under 9 minutes.
#   benchmarks/cuda/run.sh WHEELS [OUT [SECONDS]]
# WHEELS: a folder of wheels (README.md says which); OUT: where results go; SECONDS: for everything, 540 unless given
set -euo pipefail
cd "$(dirname "$0")/../.."
wheels=${1:?usage: benchmarks/cuda/run.sh WHEELS [OUT [SECONDS]]}
out=${2:-benchmarks/results/cuda}
seconds=${3:-540}
[[ "$seconds" =~ ^[0-9]+$ && "$seconds" -ge 60 ]] || { echo "error: SECONDS is '$seconds', and must be a whole number from 60 on" >&2; exit 1; }
mkdir -p "$out"
end=$((SECONDS + seconds - 15)) # 15 seconds kept for what follows the last step
lost=3 # how the sweep ends when a kernel has taken the device from its process

python3 -c 'import importlib.util as u, sys; u.find_spec("torch") or sys.exit("error: python3 has no torch here; run this on a GPU box")'
python3 -c 'import sys, torch; torch.cuda.is_available() or sys.exit("error: torch sees no CUDA device here; run this on a GPU box")'
compgen -G "$wheels/*.whl" > /dev/null || { echo "error: no wheels in $wheels; README.md says how to fetch them" >&2; exit 1; }

# Beside the box's own packages and not over them: torch, triton and transformers stay what they are.
site=$(mktemp -d)
install() { python3 -m pip install --quiet --no-index --no-deps --target "$site" "$@"; }
# One wheel for another Python must not cost the results of all: the rest goes in without it.
install "$wheels"/*.whl || for wheel in "$wheels"/*.whl; do install --upgrade "$wheel" || echo "left out: $wheel"; done
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"

python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name())' | tee "$out/box.txt"
python3 benchmarks/cuda/limits.py --gpu "${GPU:-h100}" > "$out/limits.jsonl"

# Runs a command until so many seconds from now. Interrupted, not ended: then pytest still writes which tests failed. What heeds no interrupt
# (a hanging kernel) is killed. In the foreground, so that Ctrl-C reaches it too.
within() { timeout --foreground --signal=INT --kill-after=10 "$(($1 > 0 ? $1 : 1))" "${@:2}"; }

# The tests first, which are short where they may run side by side; at most 40% of the time. Each process compiles its own kernels.
side_by_side=()
python3 -c 'import xdist' 2> /dev/null && side_by_side=(-n "${WORKERS:-12}")
TORCHINDUCTOR_COMPILE_THREADS=4 within $((seconds * 2 / 5)) python3 -m pytest -q -rs -m cuda "${side_by_side[@]}" tests/test_cuda.py > "$out/tests.txt" 2>&1 ||
    echo "the tests ended with $?"
tail -n 20 "$out/tests.txt"

python3 benchmarks/cuda/shielding.py > "$out/shielding.jsonl" || echo "the times of shielding ended with $?"

# The sweep puts its most telling rows first, checks each against the reference and appends it as it finishes: cut short, it is still of use.
# A lost device is lost for that process alone: the next one goes on behind the row that says so.
while true; do
    code=0
    within $((end - SECONDS)) python3 -m attnzoo bench --config "${CONFIG:-configs/bench/cuda.yaml}" --output "$out/bench.jsonl" || code=$?
    [ "$code" = "$lost" ] && [ $((end - SECONDS)) -gt 30 ] || break
done
[ "$code" = 0 ] || echo "the sweep ended with $code"
