"""The files that a run writes into its folder: configuration, checkpoints, metrics, result and curves."""
