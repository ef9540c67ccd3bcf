"""`python -m llmopt`, so that torchrun can start the command."""
from llmopt.cli.commands import main

main()
