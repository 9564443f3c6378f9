"""Longformer, and its global tokens."""
