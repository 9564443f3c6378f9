"""Sparse attention over blocks of keys that the data select, and how such rows are laid out."""
