"""Other people's training code for the same model: one file a rival, each with `build(shape, weights, ...)`."""
