"""How far a variant's A is from exact attention's: on real queries, keys and values where their
packages are there."""

from attnzoo.fidelity.comparison import check_device, compare
from attnzoo.fidelity.comparison_rows import Comparison, HeatMap, Row, Sample
from attnzoo.fidelity.samples import LENGTHS, load_samples
from attnzoo.fidelity.synthetic import synthetic_sample

__all__ = [
    "LENGTHS",
    "Comparison",
    "HeatMap",
    "Row",
    "Sample",
    "check_device",
    "compare",
    "load_samples",
    "synthetic_sample",
]
