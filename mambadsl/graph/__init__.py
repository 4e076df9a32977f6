"""Floor 3: structure. ModelSpec -> LayerGraph -> CheckedGraph; costs of nodes from kinds' tables."""
