"""Which tokens of a row are real, in which order they stand, and which belong together."""
