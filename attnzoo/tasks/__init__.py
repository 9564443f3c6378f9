"""Small training tasks that tell attentions apart, and the study that trains on them."""
