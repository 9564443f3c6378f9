"""A training study shown: tables, figures and a page."""
