"""Tensors in, tensors out: the mathematics of adapters, which knows nothing of files, names or formats."""
