"""What makes q, k and v from hidden states: projections around an attention."""
