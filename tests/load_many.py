"""Loads folders the way a stranger would and keeps what came of it.

python load_many.py plain|trust|plain,trust|import RESULTS.pt FOLDER...      RESULTS: {how: {folder: what came of it}}
"""
import sys
import warnings

import torch

HOW, RESULTS, *FOLDERS = sys.argv[1:]

if HOW == "import":
    import llmopt  # noqa: F401
else:
    sys.modules["llmopt"] = None      # as on a machine without llmopt

from transformers import AutoModelForCausalLM, logging  # noqa: E402

logging.set_verbosity_error()
warnings.simplefilter("ignore")


def look(folder: str, trust: bool) -> dict:
    """Logits and 32 greedy tokens of a loaded folder, or the error that loading raised."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust).eval()
    except Exception as error:  # noqa: BLE001  any refusal is a result here
        return {"error": f"{type(error).__name__}: {error}"}
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=0, eos_token_id=None)
    return {"logits": logits, "tokens": tokens}


# plain first: a trusted folder's classes stay behind AutoModelForCausalLM
torch.save({how: {folder: look(folder, how == "trust") for folder in FOLDERS} for how in HOW.split(",")}, RESULTS)
