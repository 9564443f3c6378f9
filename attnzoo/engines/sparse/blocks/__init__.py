"""Patterns in whole blocks: the engine, which blocks are seen, and each way to compute them."""
