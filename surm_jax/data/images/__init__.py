"""Data sets of images, transforms of images, and pipelines that make batches of images."""
