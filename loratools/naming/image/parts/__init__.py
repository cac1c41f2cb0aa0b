"""Rules that several families share."""
