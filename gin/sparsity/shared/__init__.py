"""What the files of sparsity/*.gin share."""
