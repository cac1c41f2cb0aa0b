"""Whether a merged model is its base plus its adapters and nothing else, told from the files alone."""
