"""Calibration data, and what is learned from it block by block."""
