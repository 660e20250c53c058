"""Shards: records converted to files with random access; distilled data."""
