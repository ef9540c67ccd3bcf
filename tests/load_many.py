"""Loads folders the way a stranger would and keeps what came of it.

python load_many.py plain|trust|plain,trust|import|see RESULTS.pt FOLDER...    RESULTS: {how: {folder: what came of it}}

see: models that read images or sound; all weights, and the logits of their language part alone where there is a class.
"""
import sys
import warnings

import torch

HOW, RESULTS, *FOLDERS = sys.argv[1:]

if HOW == "import":
    import llmopt  # noqa: F401
else:
    sys.modules["llmopt"] = None      # as on a machine without llmopt

from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, logging  # noqa: E402

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


def see(folder: str) -> dict:
    """Logits, weights, and the logits of what AutoModelForCausalLM makes of the folder (None: no such class)."""
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(1))
    model = AutoModelForMultimodalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        logits, alone = model(ids).logits, None
        if type(model.config) in AutoModelForCausalLM._model_mapping:
            alone = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()(ids).logits
    return {"logits": logits, "weights": model.state_dict(), "alone": alone}


# plain first: a trusted folder's classes stay behind AutoModelForCausalLM
torch.save({how: {folder: see(folder) if how == "see" else look(folder, how == "trust") for folder in FOLDERS}
            for how in HOW.split(",")}, RESULTS)
