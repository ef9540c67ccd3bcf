"""Structural pruning: whole channels, KV groups, sub-blocks and blocks leave the model."""
