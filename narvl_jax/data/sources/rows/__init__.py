"""Rows of text files."""
