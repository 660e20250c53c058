"""Compares the parallel model with its autoregressive counterpart."""
