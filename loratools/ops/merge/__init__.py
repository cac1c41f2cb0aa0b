"""merge: add weighted adapters to the weights of a checkpoint, file to file."""
