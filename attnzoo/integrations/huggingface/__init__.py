"""Hugging Face transformers: swapping, masks, and generation with bounded states."""
