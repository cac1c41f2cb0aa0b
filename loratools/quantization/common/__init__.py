"""What schemes of quantised weights share."""
