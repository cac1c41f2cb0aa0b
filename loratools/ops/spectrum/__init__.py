"""spectrum: the singular values of an adapter or of a fine-tune, and what each rank keeps."""
