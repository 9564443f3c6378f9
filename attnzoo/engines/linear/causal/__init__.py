"""Causal kernel attention in chunks of tokens."""
