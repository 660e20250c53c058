"""The official PyTorch code as a peer; see `benchmarks.reference`."""
