"""Uses of stored evaluations that need neither the model nor the pictures."""
