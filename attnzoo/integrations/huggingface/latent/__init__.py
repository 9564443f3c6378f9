"""transformers' latent attention layers and their caches as this library's."""
