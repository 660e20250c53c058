"""Data: sources, vocabulary, tasks, pictures and the pipeline of batches."""
