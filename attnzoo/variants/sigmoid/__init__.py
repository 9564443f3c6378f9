"""Sigmoid attention, whose rows have no sum."""
