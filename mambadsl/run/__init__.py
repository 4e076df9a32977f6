"""Floor 6: a built model at work: text generation."""
