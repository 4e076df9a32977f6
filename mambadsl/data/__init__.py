"""Training data: files -> `Corpus` -> `Rows` -> batches."""
