"""`t5x-sparsity report`: one page of one or more runs."""
