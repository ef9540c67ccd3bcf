"""lm-eval's own command, with the model class `llmopt` known to it (lm-eval has no plug-ins).

python -m llmopt_evals --model llmopt --model_args pretrained=out --tasks arc_easy,world_ppl --include_path TASKS
"""
from lm_eval.__main__ import cli_evaluate

import llmopt  # noqa: F401  checkpoints attach their runtime parts
import llmopt_evals.lm  # noqa: F401  registers `llmopt`

if __name__ == "__main__":
    cli_evaluate()
