"""Performer, and its random features."""
