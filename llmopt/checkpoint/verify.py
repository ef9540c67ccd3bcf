"""Whether a written folder gives the model in memory back: a fresh load, compared by names, logits and greedy text."""
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from llmopt.errors import LlmoptError
from llmopt.model.auto import auto_class
from llmopt.model.computing import computing
from llmopt.model.context import context_length
from llmopt.model.stay_packed import packing

DELTAS = "rope_deltas"      # what a model that sees keeps of the rows it has read last, however many they were
CACHES = ("past_key_values", "cache_params", "state")     # what models call that which they read on from


class VerificationError(LlmoptError):
    """The written folder does not give the model in memory back."""

    exit_code = 3


@torch.no_grad()
def verify(folder: Path, model: nn.Module) -> None:
    """Load `folder` afresh and raise VerificationError unless weights, logits and greedy text equal the model's."""
    config = AutoConfig.from_pretrained(folder)
    with packing(False):                    # what other readers get, whatever the environment says
        fresh, info = auto_class(config).from_pretrained(folder, dtype="auto", output_loading_info=True)
    fresh = fresh.to(model.device).eval()
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[kind]:
            raise VerificationError(f"{folder.name}: {kind}: {sorted(map(str, info[kind]))[:3]}")
    ids = probe(model)
    with computing(model):
        mine, theirs = model(ids).logits.float(), fresh(ids).logits.float()
    worst = (mine - theirs).abs().max().item()
    bound = 64 * torch.finfo(model.dtype).eps * mine.abs().max().item()
    if not worst <= bound:
        raise VerificationError(f"the reloaded model's logits differ by {worst:.3g} (allowed {bound:.3g})")
    with _unread(model):
        if worst == 0 and greedy(model, ids[:1]) != greedy(fresh, ids[:1]):
            raise VerificationError("the reloaded model writes another greedy text than the model in memory")


@contextmanager
def _unread(model: nn.Module) -> Iterator[None]:
    """Inside, the model knows nothing of rows that it has read before."""
    known = {module: module.__dict__[DELTAS] for module in model.modules() if module.__dict__.get(DELTAS) is not None}
    try:
        for module in known:
            setattr(module, DELTAS, None)
        yield
    finally:
        for module, deltas in known.items():
            setattr(module, DELTAS, deltas)


def probe(model: nn.Module) -> Tensor:
    """Fixed random ids [2, T] that any vocabulary holds."""
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    return torch.randint(0, size, (2, probe_length(model)), generator=generator).to(model.device)


def probe_length(model: nn.Module) -> int:
    """Tokens in a row of the probe."""
    return min(64, context_length(model.config) // 2)


def greedy(model: nn.Module, ids: Tensor, count: int = 8) -> list[int]:
    """The next `count` tokens; without `generate`, which listens to whatever the model's generation config says."""
    kept, written = {}, []
    for _ in range(count):
        step = model(ids, use_cache=True, **kept)
        kept, ids = {key: step[key] for key in CACHES if key in step}, step.logits[:, -1:].argmax(-1)
        written.append(ids.item())
    return written
