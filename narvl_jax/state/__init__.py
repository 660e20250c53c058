"""What an update reads and writes: parameters, their rules, the state."""
