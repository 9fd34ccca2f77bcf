"""The statistics of a batch and the moving averages."""
