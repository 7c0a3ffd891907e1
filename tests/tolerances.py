"""Relative errors allowed to a computation of some hundred operations in a dtype."""

TOLERANCE = {"bfloat16": 0.05, "float32": 2e-5, "float64": 1e-10}
