"""A comparison shown: tables on the screen, figures, and one self-contained HTML page."""
