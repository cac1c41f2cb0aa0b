"""list: a row for every adapter below some folders, from headers alone."""
