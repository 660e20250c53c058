"""Tfds."""
