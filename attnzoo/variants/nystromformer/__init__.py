"""Nyströmformer, and its landmarks."""
