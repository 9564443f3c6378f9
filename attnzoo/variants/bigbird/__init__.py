"""BigBird, and its random blocks."""
