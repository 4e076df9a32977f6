"""Floor 1: text <-> tree. Knows the grammar, no layer kind."""
