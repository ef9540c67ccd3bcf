"""How many tokens a model reads in a row."""
from typing import Any

UNBOUND = 1 << 20       # of models without positions, which tell no number


def context_length(config: Any) -> int:
    """The most tokens that a causal LM's config allows."""
    text = config.get_text_config()
    found = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    return UNBOUND if found is None else found
