"""Code that all verbs share: their arguments, what formats need to know of a base, and comparing tensors."""
