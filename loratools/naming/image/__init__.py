"""Names of image and video models: one file is one family or a group of them."""
