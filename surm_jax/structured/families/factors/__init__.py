"""Families whose matrices are built from small dense factors."""
