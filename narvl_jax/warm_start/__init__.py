"""Weights of another run, or converted ones, as the start of a new run."""
