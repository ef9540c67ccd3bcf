"""What a step asks the run's memory to keep is made once, whatever happens."""
import pytest
import torch

from llmopt.scale.journal import Interrupted, Journal
from llmopt.scale.memory import Memory, Resumable


def made(calls: list, seed: int) -> dict[str, torch.Tensor]:
    calls.append(seed)
    return {"a": torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)), "b.c": torch.tensor([seed])}


def kept(journal: Journal, calls: list, names: list[str]) -> list[dict[str, torch.Tensor]]:
    memory = Resumable(journal)
    memory.begin(3)
    return [memory.keep_named(name, lambda i=i: made(calls, i)) for i, name in enumerate(names)]


def test_named_tensors_survive_a_crash(tmp_path):
    """A search keeps its candidates one by one: after Ctrl-C those that were kept are read, a damaged one is remade."""
    calls, names = [], ["supernet/0 (first)", "supernet/1", "supernet/2"]
    journal = Journal(tmp_path / "work")
    with pytest.raises(Interrupted), journal.opened({"run": 1}):
        kept(journal, calls, names[:2])
        raise KeyboardInterrupt
    file, = (tmp_path / "work" / "step-3").glob("kept-supernet-1-*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    journal = Journal(tmp_path / "work")
    with journal.opened({"run": 1}):
        found = kept(journal, calls, names)
    assert calls == [0, 1, 1, 2]
    for i, tensors in enumerate(found):
        assert all(torch.equal(tensors[name], tensor) for name, tensor in made([], i).items())
    assert any("damaged" in line for line in journal.messages)


def test_without_a_journal_they_are_made_each_time():
    calls = []
    assert Memory().keep_named("x", lambda: made(calls, 7))["b.c"].tolist() == [7] and calls == [7]
