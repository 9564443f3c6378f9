"""Attention whose keys the data select: what each variant scores its blocks by."""
