"""Floor 5: torch. A graph becomes modules, whole or by stage; weights get values, and go to disk and back."""
