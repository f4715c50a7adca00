"""Gin files for sparse training: `include 'sparsity/rigl.gin'` finds them here."""
