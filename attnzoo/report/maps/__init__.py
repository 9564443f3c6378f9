"""A of a model's layers as a page."""
