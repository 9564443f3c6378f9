"""Texts for models to read: plays, plain prose, files."""
