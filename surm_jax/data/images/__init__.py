"""Sets of images, their transforms and their batches."""
