"""Turns names on the command line and in registries into values."""
