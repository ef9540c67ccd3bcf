"""What llmopt is measured with: the embedded world, its lm-eval tasks, speed."""
