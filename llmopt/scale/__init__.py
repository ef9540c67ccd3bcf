"""Larger than memory, cut off, several processes."""
