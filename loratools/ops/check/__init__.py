"""check: what is wrong with adapters and models, by rules with stable ids."""
