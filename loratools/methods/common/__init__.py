"""Code that several methods of combining share."""
