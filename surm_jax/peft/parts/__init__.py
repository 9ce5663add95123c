"""The parts that an adapter puts into the modules of a model, and the protocol that all of them keep."""
