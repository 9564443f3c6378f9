"""Scaling tables and figures, and their page."""
