"""Floor 5: torch. A graph becomes modules, whole or one pipeline stage; weights get values, are saved and loaded."""
