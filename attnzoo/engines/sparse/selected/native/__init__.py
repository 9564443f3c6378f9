"""Keys chosen by an indexer in C++, compiled on the machine that runs it."""
