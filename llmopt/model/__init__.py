"""A Hugging Face model as llmopt sees it: its parts, shapes, codes and files."""
