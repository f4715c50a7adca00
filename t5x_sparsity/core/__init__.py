"""Exact masks and one train step around them, of arrays and pytrees; it needs JAX alone."""
