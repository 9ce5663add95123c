"""Looking at matrices: which family fits one, its spectrum, and its picture."""
