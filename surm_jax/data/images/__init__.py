"""Sets of images, and what their pixels go through."""
