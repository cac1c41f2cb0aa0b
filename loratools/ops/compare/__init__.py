"""compare: how alike adapters are."""
