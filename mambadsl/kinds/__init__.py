"""Floor 1: what a layer can be. One folder a kind; the folder is the registration.

`kinds/<name>/kind.py` ends in `KIND = Kind(...)` and knows no torch; `module.py` offers `Module`,
`naive.py` the definition that every faster form is held to. `kinds/kind.py` is the protocol.
"""
