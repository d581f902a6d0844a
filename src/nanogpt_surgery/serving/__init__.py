"""A model served to many at once, over HTTP and in a browser."""
