"""What all verbs share: their arguments, what formats are told of a base, and comparing tensors."""
