"""Ahead of time."""
