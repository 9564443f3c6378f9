"""Reformer, and its hashing."""
