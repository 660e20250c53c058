"""A training run: start, loop, progress and bad updates."""
