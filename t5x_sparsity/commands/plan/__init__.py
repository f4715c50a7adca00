"""`t5x-sparsity plan`: what a run would be, from its gin files."""
