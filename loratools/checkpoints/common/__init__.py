"""What the layouts of a whole model share."""
