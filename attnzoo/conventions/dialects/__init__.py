"""How other libraries spell attention."""
