"""Tiles of softmax attention in C++, compiled on the machine that runs them."""
