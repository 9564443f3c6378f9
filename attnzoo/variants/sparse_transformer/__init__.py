"""Sparse Transformer, and its factorized patterns."""
