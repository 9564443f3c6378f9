"""Softmax attention in memory that is used again, some rows of a head at a time."""
