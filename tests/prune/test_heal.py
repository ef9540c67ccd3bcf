"""prune.heal: it learns from the dense model, is never worse than before, and goes on where it was cut off."""
import copy

import pytest
import torch
from safetensors.torch import load_file

from llmopt.calibration import learning
from llmopt.calibration.logits_loss import LogitsLoss, outputs
from llmopt.errors import LlmoptError
from llmopt.forecast.memory import whole_bytes
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.prune import Depth, Heal, heal
from llmopt.prune.surgery import LayerPlan, apply_plan
from llmopt.run.pipeline import apply_steps
from llmopt.scale.journal import Journal
from llmopt.scale.memory import Memory, Resumable
from tests import tiny

CONTRACT = {"epochs": 3}
BEFORE = {"prune.depth": {"ratio": 0.34, "score": "bi", "repair": False}}


def data(rows=16):
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in tiny.ids(rows, 24).split(4)]


def pruned(family="llama", **given):
    """(a model without its middle block, a run that knows the whole one)."""
    model, run = tiny.make(family), Run(data(), **given)
    run.dense = outputs(model, run.batches)
    apply_plan(model, [LayerPlan(drop=index == 1) for index in range(3)], Run())
    return model, run


@pytest.mark.parametrize(("train", "family"), [("all", "llama"), ("writers", "llama"), ("low_rank", "llama"),
                                               ("low_rank", "gpt2"), ("all", "qwen3_moe")])
def test_what_learns_predicts_better_and_nothing_else_moves(train, family):
    model, run = pruned(family)
    before = copy.deepcopy(model.state_dict())
    record = Heal(train=train, epochs=10).apply(model, run)
    assert record.meta["loss"] < 0.95 * record.meta["loss_before"] and record.meta["steps"] == 30
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    own = [name for name, _ in model.named_parameters() if f"{blocks(model)[0].name}." in name]
    learns = {"all": own, "writers": [n for n in own if "norm" in n or "o_proj" in n or "down_proj" in n],
              "low_rank": [n for n in own if "bias" not in n or "ln_" in n]}[train]
    assert {name for name in moved if f"{blocks(model)[0].name}." in name} == set(learns)
    assert not moved - {name for name, _ in model.named_parameters() if name.startswith(blocks(model)[0].name[:-1])}
    assert record.meta["loss"] == pytest.approx(divergence(model, family), rel=1e-3)


@torch.no_grad()
def divergence(model, family):
    """From the whole model, on the batch that is held out."""
    ids = data()[0]["input_ids"]
    logs = [one(ids).logits.log_softmax(-1) for one in (model, tiny.make(family))]
    return float(torch.nn.functional.kl_div(*logs, log_target=True, reduction="none").sum(-1).mean())


def test_the_state_before_stays_where_learning_does_harm():
    model, run = pruned()
    before = copy.deepcopy(model.state_dict())
    record = Heal(rate=30.0, epochs=2).apply(model, run)
    assert record.meta["loss"] == record.meta["loss_before"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("train", ["all", "low_rank"])
def test_single_weights_that_are_gone_stay_gone(train):
    model, run = pruned()
    weight = blocks(model)[1].ffn_in[0].weight
    weight[:, ::2] = 0
    before = weight.clone()
    Heal(train=train, epochs=2).apply(model, run)
    assert not weight[:, ::2].any() and not torch.equal(weight, before)


class CutOff(Memory):
    """Keeps what a journal keeps, and dies in the middle of the third state."""

    def __init__(self):
        self.kept, self.told, self.states = {}, {}, 0

    def remember(self, name, compute):
        return self.told.setdefault(name, compute()) if name not in self.told else self.told[name]

    def latest(self, name):
        return self.kept.get(name)

    def keep_latest(self, name, tensors, told):
        self.states += 1
        if self.states == 3:
            raise KeyboardInterrupt
        self.kept[name] = ({key: tensor.clone() for key, tensor in tensors.items()}, copy.deepcopy(told))


def test_a_run_that_was_cut_off_ends_where_the_whole_one_does():
    whole, run = pruned()
    record = Heal(epochs=10).apply(whole, run)
    memory = CutOff()
    model, run = pruned(memory=memory)
    with pytest.raises(KeyboardInterrupt):
        Heal(epochs=10).apply(model, run)
    assert memory.kept[heal.STATE][1]["step"] == 6
    model, run = pruned(memory=memory)
    again = Heal(epochs=10).apply(model, run)
    assert memory.states == 3 + 8 and again.meta == record.meta
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_of_two_states_the_newer_is_found_unless_it_is_damaged(tmp_path):
    journal = Journal(tmp_path / "work")
    with journal.opened({}):
        memory = Resumable(journal)
        assert memory.latest("state") is None
        for number in range(3):
            memory.keep_latest("state", {"x": torch.tensor([number])}, {"step": number})
        assert memory.latest("state")[0]["x"].item() == memory.latest("state")[1]["step"] == 2
        newest, = [file for file in (tmp_path / "work").rglob("kept-state*") if load_file(file)["x"].item() == 2]
        newest.write_bytes(b"torn")
        assert memory.latest("state")[1]["step"] == 1


def test_as_many_steps_as_there_is_time_for(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(learning.time, "monotonic", lambda: next(clock))
    number = torch.ones(1)
    assert learning.planned(lambda index: number.square().sum(), [number], 0, 3, 1000, 100.0) == 90 - 11 * 3 / 3
    clock = iter(range(100))
    assert learning.planned(lambda index: number.square().sum(), [number], 0, 3, 20, 100.0) == 20


def test_the_run_remembers_the_dense_model_by_itself():
    model = tiny.make("llama")
    told = apply_steps(model, [Depth(ratio=0.34, score="bi"), Heal(epochs=10)], Run(data())).records[1]["meta"]
    assert told["loss"] == pytest.approx(divergence(model, "llama"), rel=1e-3)
    assert told["loss"] < 0.95 * told["loss_before"]
    with pytest.raises(LlmoptError, match="in one run"):
        Heal().apply(model, Run(data()))
    with pytest.raises(LlmoptError, match="needs calibration data"):
        Heal().apply(model, Run())


def test_hidden_states_count_by_their_share():
    model, run = pruned()
    found = [LogitsLoss(model, run.batches, run.dense, dict, hidden) for hidden in (0.0, 0.5)]
    plain, both = (sum(float(loss(index).detach()) for index in range(4)) for loss in found)
    now = torch.cat(outputs(model, run.batches))
    dense = torch.cat(run.dense)
    want = 0.5 * (now - dense).square().sum() / dense.square().sum()
    assert both - plain == pytest.approx(float(want.detach()), rel=1e-4)


def test_it_takes_the_memory_of_what_learns():
    model = tiny.make("llama")
    size = sum(p.numel() for block in blocks(model) for p in block.module.parameters())
    bare = whole_bytes(Heal(train="low_rank", rank=1), model, 1, 8)
    assert whole_bytes(Heal(), model, 1, 8) - bare > 18 * size
