"""Floor 0: characters. Source and Span say where, Diagnostic says what, render says it to people."""
