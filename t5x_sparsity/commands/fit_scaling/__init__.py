"""`t5x-sparsity fit-scaling`: the sparse scaling law, fitted to a table of runs."""
