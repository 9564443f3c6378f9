"""attnzoo: attention variants behind one interface, tested against oracles, compared with exact
attention, with their cost known."""

from attnzoo import conformance, conventions, oracles
from attnzoo.attention import Attention, Input, Spec
from attnzoo.call import UnsupportedError
from attnzoo.cost.memory.memory import Memory, memory
from attnzoo.cost.tracing.counting import FlopReport, count_flops
from attnzoo.cost.tracing.flop_counters import FlopCounters, register_flop_counters
from attnzoo.engines.engine import Cost
from attnzoo.integrations.huggingface.fallbacks.replace_fallbacks import (
    replace_fallbacks,
    restore_fallbacks,
)
from attnzoo.integrations.huggingface.generation import state_cache
from attnzoo.integrations.huggingface.latent.latent_layer import latent_layer
from attnzoo.integrations.maps.attention_maps import attention_maps
from attnzoo.integrations.sidecar import load, save
from attnzoo.integrations.swapping import swap, unswap
from attnzoo.layers import distance_biases
from attnzoo.layers.latent.latent_attention import LatentAttention
from attnzoo.layers.multihead import MultiheadAttention
from attnzoo.layers.packed_model import packed
from attnzoo.registry import build, describe, names, register
from attnzoo.variants.longformer.global_mask_of_model import global_mask
from attnzoo.version import __version__ as __version__

__all__ = [
    "Attention",
    "Cost",
    "FlopCounters",
    "FlopReport",
    "Input",
    "LatentAttention",
    "Memory",
    "MultiheadAttention",
    "Spec",
    "UnsupportedError",
    "attention_maps",
    "build",
    "conformance",
    "conventions",
    "count_flops",
    "describe",
    "distance_biases",
    "global_mask",
    "latent_layer",
    "load",
    "memory",
    "names",
    "oracles",
    "packed",
    "register",
    "register_flop_counters",
    "replace_fallbacks",
    "restore_fallbacks",
    "save",
    "state_cache",
    "swap",
    "unswap",
]
