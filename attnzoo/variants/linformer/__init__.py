"""Linformer, and its length projections."""
