"""Counting the operations of any module by tracing it, through fvcore."""
