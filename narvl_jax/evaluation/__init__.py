"""Evaluation: scores of the four tasks, reports and pictures."""
