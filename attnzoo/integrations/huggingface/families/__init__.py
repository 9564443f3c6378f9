"""Families of transformers whose attention is another class while a model of theirs is swapped: it
consults the attention interface, or tells it a bias by distance."""
