#!/usr/bin/env bash
# Seen on 2026-11-30 with torch 2.13.0 on a CPU. No other version was tried.
#
# torch's scaled_dot_product_attention takes values of another width than keys, as latent attention (DeepSeek) and differential attention have them. One
# would expect its CPU kernel, which never forms the scores of all pairs, to take them as well, or the memory to stay what it was.
#
# It takes the composed path, which forms the scores: its memory grows with the square of the length. Filling the narrower of the two up with zeros and
# cutting the rows gives the same rows in memory that grows with the length.
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

import torch
import torch.nn.functional as F

print("torch", torch.__version__)


def operators_and_peak(q, k, v):
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        F.scaled_dot_product_attention(q, k, v)
    names = {event.key for event in profile.key_averages()}
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    return names, largest


length = 2048
q, k = torch.randn(2, 1, 1, length, 64).unbind()
same, wide = torch.randn(1, 1, length, 64), torch.randn(1, 1, length, 128)
names, held = operators_and_peak(q, k, same)
print(f"values of 64: {held / 2**20:.1f} MiB by one operator at most")
fused = "aten::_scaled_dot_product_flash_attention_for_cpu"
wide_names, wide_held = operators_and_peak(q, k, wide)
print(f"values of 128: {wide_held / 2**20:.1f} MiB; the scores alone are {length**2 * 4 / 2**20:.0f}")
filled = F.pad(q, (0, 64)), F.pad(k, (0, 64))
padded = F.scaled_dot_product_attention(*filled, wide, scale=64**-0.5)
print("filled up, the same rows:", torch.allclose(padded, F.scaled_dot_product_attention(q, k, wide), atol=1e-5))
if fused not in names or fused in wide_names or wide_held < length**2 * 4:
    print("this is not what was seen on 2026-11-30")
    sys.exit(1)
print("as seen on 2026-11-30: values of another width take the path that forms all scores")
PYTHON
"$folder/venv/bin/python" "$folder/finding.py"
