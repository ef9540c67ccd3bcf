"""The command: what it is told, and what it prints."""
from llmopt.cli.commands import main

__all__ = ["main"]
