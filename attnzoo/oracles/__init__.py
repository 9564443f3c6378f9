"""What each attention is, in float64 loops written from the papers' equations: one file a variant.

An oracle is slow, complete and independent: it imports nothing of the library that it judges, and
says in the paper's own terms which number stands where in A. Hold a kernel of your own against it:

    out, weights = attnzoo.oracles.sliding_window(q, k, v, window=128, is_causal=True)

`ORACLES` has them by the name of the variant. `matrix` says what all of them take and return.
"""

from importlib import import_module
from pkgutil import iter_modules

from attnzoo.oracles.bigbird import bigbird
from attnzoo.oracles.cosformer import cosformer
from attnzoo.oracles.flash import flash
from attnzoo.oracles.gated.deltanet import deltanet
from attnzoo.oracles.gated.gated_deltanet import gated_deltanet
from attnzoo.oracles.gated.gla import gla
from attnzoo.oracles.gated.kda import kda
from attnzoo.oracles.gated.lightning import lightning
from attnzoo.oracles.gated.log_linear import log_linear
from attnzoo.oracles.gated.mamba2 import mamba2
from attnzoo.oracles.gated.rwkv7 import rwkv7
from attnzoo.oracles.linear import linear
from attnzoo.oracles.linformer import linformer
from attnzoo.oracles.longformer import longformer
from attnzoo.oracles.matrix import ORACLES, Oracle, oracle
from attnzoo.oracles.nystromformer import nystromformer
from attnzoo.oracles.performer import performer
from attnzoo.oracles.reformer import reformer
from attnzoo.oracles.retention import retention
from attnzoo.oracles.rows.differential import differential, differential_v2
from attnzoo.oracles.rows.forgetting import forgetting
from attnzoo.oracles.rows.path import path
from attnzoo.oracles.rows.sigmoid import sigmoid
from attnzoo.oracles.selected.indexed import indexed
from attnzoo.oracles.selected.moba import moba
from attnzoo.oracles.selected.nsa import nsa
from attnzoo.oracles.selected.xattention import xattention
from attnzoo.oracles.sliding_window import sliding_window
from attnzoo.oracles.sparse_transformer import sparse_transformer
from attnzoo.oracles.standard import standard

__all__ = [
    "ORACLES",
    "Oracle",
    "bigbird",
    "cosformer",
    "deltanet",
    "differential",
    "differential_v2",
    "flash",
    "forgetting",
    "gated_deltanet",
    "gla",
    "indexed",
    "kda",
    "lightning",
    "linear",
    "linformer",
    "log_linear",
    "longformer",
    "mamba2",
    "moba",
    "nsa",
    "nystromformer",
    "oracle",
    "path",
    "performer",
    "reformer",
    "retention",
    "rwkv7",
    "sigmoid",
    "sliding_window",
    "sparse_transformer",
    "standard",
    "xattention",
]

for _module in iter_modules(__path__):  # those of variants that the list above does not have yet
    import_module(f"{__name__}.{_module.name}")
