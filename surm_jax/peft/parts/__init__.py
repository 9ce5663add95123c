"""Parts, which are what an adapter adds to the modules of a model, and the protocol that every part follows."""
