"""Pictures: files, decoding, augmentation, and drawings of predictions."""
