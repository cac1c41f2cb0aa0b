"""The pieces of the PEFT format: its config, its keys, its kinds, and what it is written from."""
