"""Methods that add nothing to the model and train a part of what is there."""

#: What each selection trains besides the modules that every method trains (the head): patterns of parameter paths.
SELECTIONS: dict[str, tuple[str, ...]] = {
    "linear_probe": (),
    "full": (".*",),
}
