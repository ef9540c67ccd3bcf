"""How many tokens a model reads in a row."""
from typing import Any

UNBOUND = 1 << 20       # of models without positions, which tell no number


def context_length(config: Any) -> int:
    """The most tokens that a causal LM's config allows."""
    text = config.get_text_config()
    found = (getattr(text, key, None) for key in ("max_position_embeddings", "max_seq_len"))
    return next((most for most in found if most is not None), UNBOUND)
