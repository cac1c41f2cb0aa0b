"""combine: make one adapter of several."""
