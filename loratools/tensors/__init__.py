"""Tensors that are read when they are used: dtypes, byte ranges in files, lazy tensors and views of them."""
