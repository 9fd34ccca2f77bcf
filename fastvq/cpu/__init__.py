"""The certified search, the statistics and the moving averages in plain PyTorch."""
