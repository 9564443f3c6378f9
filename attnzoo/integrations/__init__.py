"""The zoo inside models that exist: Hugging Face transformers, torch.nn, timm."""

from attnzoo.integrations.huggingface.load_warning import watch_loading

watch_loading()
