"""The version of attnzoo, which result files and saved swaps carry."""

__version__ = "0.2.0"
