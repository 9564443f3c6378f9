"""What every attention holds to, a function each."""
