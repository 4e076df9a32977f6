"""Floor 2: meaning. Names looked up, values evaluated, imports followed: File -> ModelSpec."""
