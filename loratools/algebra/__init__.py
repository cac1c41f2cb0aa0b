"""The mathematics of adapters on tensors, without any knowledge of files, names or formats."""
