"""The three ways to multiply by A without forming it: softmax, sparse, linear."""
