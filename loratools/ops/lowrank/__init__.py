"""Deltas as exact factors: what combine, resize, compare and spectrum share."""
