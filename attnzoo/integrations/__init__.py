"""The zoo inside models that exist: Hugging Face transformers, torch.nn, timm."""
