"""Multi-head latent attention: keys and values made of one small vector a token."""
