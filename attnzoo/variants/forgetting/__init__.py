"""Forgetting attention, and what of the past it need not read."""
