"""The sparse scaling law: its fit, how far that can be trusted, and the best sparsity by it."""
