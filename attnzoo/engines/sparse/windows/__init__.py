"""Windows: the engine, where its rows and keys stand, and each way to compute them."""
