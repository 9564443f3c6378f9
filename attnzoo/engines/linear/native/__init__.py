"""Recurrences of a state in C++, compiled on the machine that runs them."""
