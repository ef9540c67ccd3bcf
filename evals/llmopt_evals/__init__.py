"""What llmopt is measured with: the embedded world, its lm-eval tasks, speed."""

FIGURES = 1         # raised whenever a figure of the same model and task may become another one
