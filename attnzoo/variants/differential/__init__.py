"""Differential attention, as published first and second: a softmax less a part of another."""
