"""What a compression of all layers frees goes back to the system: the C library would keep it."""
import torch

import llmopt
from llmopt.runtime import compression
from tests import tiny


def test_memory_freed_from_all_layers_at_once_is_given_back(monkeypatch):
    given = []
    monkeypatch.setattr(compression, "give_back_freed", lambda: given.append(1))
    model = tiny.make("llama")
    with torch.no_grad(), llmopt.attached(model, llmopt.kv.SnapKV(ratio=0.5, allocate="global")):
        model(tiny.ids(2, 48), use_cache=True)
        assert given == []                          # a few kB are not worth a look through the heap
        monkeypatch.setattr(compression, "WORTH_GIVING_BACK", 0)
        model(tiny.ids(2, 48), use_cache=True)
    assert given == [1]
