"""Exact masks of arrays and pytrees, and one train step around them; it needs JAX alone.

A mask is True where the weight is kept, everywhere in this package.
"""
