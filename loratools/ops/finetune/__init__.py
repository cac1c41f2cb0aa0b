"""Two checkpoints side by side: what extract and spectrum share."""
