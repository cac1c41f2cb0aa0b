"""Image and video models: one file is one family, with its names and the evidence for it, as `FAMILY`."""
