"""Engine 3, linear: attention through feature maps and a state of fixed size."""
