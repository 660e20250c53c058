"""The update of a model: loss, gradient and optimizer."""
