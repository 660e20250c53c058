"""Batches of fixed shape: mixture, worker processes, bad records."""
