"""The project's own figures: what `llmopt bench` prints. One file for each subject."""
