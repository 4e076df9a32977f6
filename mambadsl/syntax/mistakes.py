def explain(source, tokens, parser):
    assert not parser.failures, [(f, tokens.items[f.index]) for f in parser.failures]
    return []
