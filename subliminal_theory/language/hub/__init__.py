"""Published checkpoints: families, tensor files, tokenizers, chat templates, adapters."""
