"""Published checkpoints: families, weights, tokenizers, chat templates and adapters."""
