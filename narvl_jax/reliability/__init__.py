"""Stop requests, watchdog, failures and the time of a run."""
