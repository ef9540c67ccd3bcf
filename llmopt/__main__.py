"""`python -m llmopt`, so that torchrun can start the command."""
from llmopt_evals.start import main

main()
