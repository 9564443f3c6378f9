"""What an attention costs: closed forms, limits of models on GPUs, and the scaling tables."""
