"""A decoder-only transformer, LoRA, sampling, and prompted and steered teachers."""
