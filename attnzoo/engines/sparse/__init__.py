"""Engine 2, sparse: softmax attention over the keys that a pattern shows each query."""
