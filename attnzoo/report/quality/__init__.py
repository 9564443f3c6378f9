"""A quality study shown: tables, figures and a page."""
