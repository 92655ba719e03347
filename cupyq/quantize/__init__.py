"""Making EXL2 checkpoints: which layer gets how many bits (anneal)."""
