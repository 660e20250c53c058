"""Evaluation: metrics of the tasks, reports and pictures of predictions."""
