"""The peers: which package, what is in its time, how many keys a row sees.

Packages are imported where a peer is made, so that a missing one costs only its own rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peer_linear import (
    fast_transformers,
    fla_naive,
    linear_attention_transformer,
    linformer,
    nystrom_attention,
    performer_pytorch,
)
from peer_settings import Ready
from peer_sparse import (
    dense_mask,
    flex,
    huggingface_bigbird,
    local_attention,
    longformer,
    x_transformers,
)

from attnzoo.benchmarking.plan import Cell

CORE = "the attention alone"
PROJECTIONS_REPLACED = (
    "the attention alone: its projections are replaced by modules that hand over q, k and v"
)


# Keys that a row sees at most: not causal, causal.
ALL = ("all", "all earlier ones")
OUR_WINDOW = ("511: |i - j| < 256", "256: 0 <= i - j < 256")
ONE_MORE = ("513: |i - j| <= 256", "257: 0 <= i - j <= 256")
BIGBIRD = ("512 in 8 distinct blocks of 64", "512 in up to 8 distinct blocks of 64")
OUR_KEYS = {"window": OUR_WINDOW, "bigbird": BIGBIRD}  # of the other groups: ALL


@dataclass(frozen=True)
class Peer:
    """Another implementation. package: its distribution. causal: the forms that it has. heads_last:
    takes (batch, length, heads, head_dim).

    known: why its results are off its formula, or leak, said only where that is measured. keys: how
    many keys a row sees at most: not causal, causal.
    """

    group: str
    label: str
    package: str
    make: Callable[[Cell], Ready]
    causal: tuple[bool, ...] = (False, True)
    heads_last: bool = False
    includes: str = CORE
    keys: tuple[str, str] = ALL
    known: str = ""


WITHOUT_MASK = "the attention alone; its n × n mask is made before"

#: In the order in which they are let into a round: what takes quadratic time comes last, when room
#: is left.
PEERS: tuple[Peer, ...] = (
    Peer("window", "local-attention", "local-attention", local_attention, keys=ONE_MORE),
    Peer(
        "window",
        "transformers Longformer",
        "transformers",
        longformer,
        causal=(False,),
        heads_last=True,
        includes=PROJECTIONS_REPLACED,
        keys=ONE_MORE,
    ),
    Peer(
        "window",
        "FlexAttention window",
        "torch",
        flex("window"),
        includes="the attention alone, compiled; its block mask is made before",
        keys=OUR_WINDOW,
    ),
    Peer(
        "bigbird",
        "FlexAttention bigbird",
        "torch",
        flex("bigbird"),
        includes="the attention alone, compiled; its block mask is made before",
        keys=BIGBIRD,
    ),
    Peer(
        "bigbird",
        "transformers BigBird",
        "transformers",
        huggingface_bigbird,
        causal=(False,),
        heads_last=True,
        includes=PROJECTIONS_REPLACED + "; it draws its random blocks anew in every pass",
        keys=("512 in 8 blocks of 64", ""),
        known="the formula counts every block once; a random block that is also a window block "
        "counts twice here",
    ),
    Peer(
        "linear",
        "fast-transformers linear",
        "pytorch-fast-transformers",
        fast_transformers,
        heads_last=True,
    ),
    Peer(
        "linear",
        "fla naive chunk",
        "flash-linear-attention",
        fla_naive,
        causal=(True,),
        heads_last=True,
        includes="the attention and elu + 1 of q and k",
    ),
    Peer(
        "efficient",
        "linear-attention-transformer",
        "linear-attention-transformer",
        linear_attention_transformer,
        known="causal rows see only whole earlier buckets of 64 tokens, never their own token",
    ),
    Peer(
        "performer",
        "performer-pytorch",
        "performer-pytorch",
        performer_pytorch,
        known="1e-4 is added to every feature after a maximum over the whole length was taken out",
    ),
    Peer(
        "linformer",
        "linformer",
        "linformer",
        linformer,
        causal=(False,),
        heads_last=True,
        includes=PROJECTIONS_REPLACED,
    ),
    Peer(
        "nystrom",
        "nystrom-attention",
        "nystrom-attention",
        nystrom_attention,
        causal=(False,),
        heads_last=True,
        includes=PROJECTIONS_REPLACED + "; without the convolution of the values",
        known="its pseudo-inverse starts from one scale for all heads, and six steps do not bring "
        "it to the end",
    ),
    Peer("exact", "x-transformers flash=True", "x-transformers", x_transformers(True)),
    Peer(
        "window",
        "SDPA dense window",
        "torch",
        dense_mask("window"),
        includes=WITHOUT_MASK,
        keys=OUR_WINDOW,
    ),
    Peer(
        "bigbird",
        "SDPA dense bigbird",
        "torch",
        dense_mask("bigbird"),
        includes=WITHOUT_MASK,
        keys=BIGBIRD,
    ),
    Peer("exact", "x-transformers", "x-transformers", x_transformers(False)),
)
