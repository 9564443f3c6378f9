#!/bin/sh
# Make an environment for the comparison with other libraries: benchmarks/peers/setup.sh [FOLDER, default .venv-peers]
# torch is pinned by constraints.txt. pytorch-fast-transformers is compiled, some minutes on two cores; where that fails, its
# rows say with what.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
venv=${1:-$root/.venv-peers}
python3 -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"
$pip install --quiet -c "$root/constraints.txt" torch numpy setuptools
$pip install --quiet -c "$root/constraints.txt" -e "$root[cli]" -r "$root/benchmarks/peers/requirements.txt"
logs=$venv/peers-build
mkdir -p "$logs"
log=$logs/pytorch-fast-transformers.txt
# Where there is an nvcc it would build for CUDA, which a torch without CUDA refuses: it must not find one.
if PATH=/usr/bin:/bin $pip install --no-deps --no-build-isolation pytorch-fast-transformers==0.4.0 >"$log" 2>&1; then
    rm "$log"
else
    echo "pytorch-fast-transformers could not be built, see $log" >&2
fi
