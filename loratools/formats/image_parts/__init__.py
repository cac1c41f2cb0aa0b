"""The pieces that formats of image and video models share: names, spellings, kinds and fused projections."""
