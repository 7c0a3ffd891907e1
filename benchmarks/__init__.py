"""Speed ratios against peers and against the machine's own limit."""
