"""Memory of any module, found by running it on tensors that have sizes and no values."""
