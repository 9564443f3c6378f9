"""A of every layer of a model, as it reads."""
