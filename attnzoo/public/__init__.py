"""Every public name of attnzoo in one list, which `import attnzoo` reads when the first of them is
asked for."""

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
from attnzoo.public.run_bench import bench
from attnzoo.public.run_compare import compare
from attnzoo.public.run_cost_table import cost_table
from attnzoo.public.run_train import train
from attnzoo.registry import build, describe, names, register
from attnzoo.variants.longformer.global_mask_of_model import global_mask

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
    "bench",
    "build",
    "compare",
    "conformance",
    "conventions",
    "cost_table",
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
    "train",
    "unswap",
]
