"""Relative errors allowed to a computation of some hundred operations in a format."""

TOLERANCE = {"float32": 2e-5, "float64": 1e-10}
