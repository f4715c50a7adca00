"""`t5x-sparsity export`: a checkpoint's weights as safetensors."""
