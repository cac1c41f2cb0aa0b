"""What methods of combining share."""
