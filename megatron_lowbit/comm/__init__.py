"""Low-bit communication of tensor-parallel partial sums (Dong et al. 2024, arXiv 2411.07942)."""
