"""A benchmark shown: tables, figures and a page."""
