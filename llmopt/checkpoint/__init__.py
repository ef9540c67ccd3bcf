"""What is written: the checkpoint, its verification, its provenance and its card."""
