"""Training a swapped model: imitating exact attention, and saving what was trained."""
