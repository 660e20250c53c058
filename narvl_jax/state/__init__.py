"""Parameters, the rules by which they are trained, and the train state."""
