"""What all pages are made of: their contents as values, the templates, and the pictures."""
