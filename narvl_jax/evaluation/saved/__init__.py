"""Comparison and export of stored evaluations, without model or pictures."""
