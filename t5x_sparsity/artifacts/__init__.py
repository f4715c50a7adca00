"""What lies on disk, read and written without a host or a model."""
