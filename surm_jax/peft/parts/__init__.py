"""What an adapter puts into a module."""
