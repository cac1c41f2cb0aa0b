"""Code that schemes of quantised weights share."""
