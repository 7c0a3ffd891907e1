"""Subliminal learning in language models."""
