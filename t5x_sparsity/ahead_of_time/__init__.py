"""Compiling train steps for machines that are not here, and reading the compiled programs."""
