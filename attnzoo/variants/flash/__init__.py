"""FlashAttention, and its tiles."""
