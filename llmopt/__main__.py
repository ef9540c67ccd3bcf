"""`python -m llmopt`, so that torchrun can start the command."""
from llmopt.cli import main

main()
