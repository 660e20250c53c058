"""Programs for the vector and matrix units of an accelerator."""
