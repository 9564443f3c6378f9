"""The zoo inside models that exist: Hugging Face transformers, torch.nn, timm."""

from attnzoo.integrations.huggingface_loading import watch_loading

watch_loading()
