"""convert: write an adapter in another format."""
