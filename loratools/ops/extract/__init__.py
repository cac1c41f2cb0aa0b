"""extract: make an adapter from a fine-tuned checkpoint and its base."""
