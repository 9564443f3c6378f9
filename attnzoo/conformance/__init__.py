"""The rules of meaning, as checks over any callable that attends.

report = attnzoo.conformance.check(my_attention, like="sliding_window", window=128)
print(report)
"""

from attnzoo.conformance.checking import RULES, check
from attnzoo.conformance.findings import Finding, Report

__all__ = ["RULES", "Finding", "Report", "check"]
