"""The source `tfds`."""
