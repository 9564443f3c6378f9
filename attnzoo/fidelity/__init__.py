"""How far a variant's A is from exact attention's: on real queries, keys and values where their packages are there."""

from attnzoo.fidelity.rows import Comparison, HeatMap, Row, Sample

__all__ = ["Comparison", "HeatMap", "Row", "Sample"]
