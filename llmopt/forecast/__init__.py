"""Size and memory before the work."""
