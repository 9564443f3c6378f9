"""Training small models on the tasks: a run, a study, and what it found."""
