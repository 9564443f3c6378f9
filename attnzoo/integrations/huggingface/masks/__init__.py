"""What transformers says of the padding, causality, windows and packing of a call."""
