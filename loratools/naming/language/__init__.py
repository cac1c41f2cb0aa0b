"""Names of language models: on disk, in memory, fused, split, and as experts."""
