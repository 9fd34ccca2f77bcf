"""How a codebook learns: k-means, restarts, and the statistics of a batch."""
