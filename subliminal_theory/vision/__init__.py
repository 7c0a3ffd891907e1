"""Subliminal learning in image classifiers."""
