"""One file for each claim. `python -m experiments` lists them."""
