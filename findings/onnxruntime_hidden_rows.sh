#!/usr/bin/env bash
# Seen on 2026-12-01 with onnxruntime 1.32.0, onnx 1.23.2 and numpy 2.4.6 on a CPU. No other version was tried.
#
# onnxruntime's MultiHeadAttention takes a key_padding_mask. Of a sample whose keys are all hidden, as a batch that is filled up has some, one would expect
# rows of 0, as torch's SDPA gives, or the mean of v, or NaN.
#
# Its rows are those without any mask: -10000 is added to every score, which softmax does not see, and every hidden value is read with its usual weight. In a
# sample with some visible keys the mask works. Who pools over such rows must mask them once more.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6 || {
    echo "The packages could not be installed, so nothing was checked." >&2
    exit 2
}

cat > "$folder/finding.py" <<'PYTHON'
import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

print("onnxruntime", onnxruntime.__version__)
FLOAT, INT32 = TensorProto.FLOAT, TensorProto.INT32


def attend(given):
    node = helper.make_node(
        "MultiHeadAttention",
        ["q", "k", "v", "", "mask"] if "mask" in given else ["q", "k", "v"],
        ["rows"],
        domain="com.microsoft",
        num_heads=1,
    )
    inputs = [
        helper.make_tensor_value_info(name, INT32 if name == "mask" else FLOAT, x.shape)
        for name, x in given.items()
    ]
    rows = helper.make_tensor_value_info("rows", FLOAT, None)
    graph = helper.make_graph([node], "one", inputs, [rows])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, given)[0]


draw = np.random.default_rng(0)
given = {name: draw.standard_normal((2, 4, 8), dtype=np.float32) for name in "qkv"}
open_rows = attend(given)
hidden_rows = attend({**given, "mask": np.array([[0, 0, 0, 0], [1, 1, 0, 0]], dtype=np.int32)})
scores = given["q"][1] @ given["k"][1, :2].T / np.sqrt(8)
weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)

hidden = np.abs(hidden_rows[0] - open_rows[0]).max()
partly = np.abs(hidden_rows[1] - weights @ given["v"][1, :2]).max()
mean = np.abs(hidden_rows[0] - given["v"][0].mean(0)).max()
print(f"all keys hidden: {hidden:.1e} from the rows without a mask, {mean:.1e} from the mean of v")
print(f"two of four hidden: {partly:.1e} from the softmax over the other two")
if not (hidden < 1e-3 < mean and partly < 1e-5):
    print("this is not what was seen on 2026-12-01")
    sys.exit(1)
print("as seen on 2026-12-01: a sample that hides all of its keys is attended as if it hid none")
PYTHON
"$folder/venv/bin/python" "$folder/finding.py"
