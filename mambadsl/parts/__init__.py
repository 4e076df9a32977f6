"""Floor 1: who can fill a slot. `sets.py` names the part sets."""
