"""Engine 1, softmax: exact attention over every key that the masks allow."""
