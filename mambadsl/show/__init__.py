"""Floor 5: eyes only. Reads any stage, changes none."""
