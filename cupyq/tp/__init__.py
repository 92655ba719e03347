"""Tensor parallelism: who holds which part of a model, how its tensors are split and read, and how ranks exchange sums."""
