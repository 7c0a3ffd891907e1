"""A decoder-only transformer, low-rank factors, sampling, and its layout over devices."""
