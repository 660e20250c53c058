"""The files of a run: lock, config, metrics, restarts."""
