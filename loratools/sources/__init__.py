"""Where sources are: paths of this machine, or addresses of repositories on the Hugging Face hub.

`local.local_path` turns what a person gave into a path that every reader takes; nobody above knows which it was.
"""
