"""`t5x-sparsity inspect`: a checkpoint's sparsity, weight by weight."""
