"""The kinds of update that an adapter makes to a weight: one file is one kind. `parts/` has what kinds share."""
