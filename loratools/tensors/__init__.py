"""Tensors that are read on access: dtypes, byte ranges in files, lazy tensors and views of them."""
