"""The model card of an output folder: what the hub reads of it, and what people should know."""
