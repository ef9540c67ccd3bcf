"""Two streams through the blocks: what the unedited model reads, what the edited one does, and what is missing."""
import weakref

import pytest
import torch

from llmopt.calibration import beside
from llmopt.calibration.beside import visits_beside
from llmopt.calibration.inputs import Inputs, each_weight
from llmopt.calibration.missing import places
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.quant import GPTQ, gptq
from tests import tiny
from tests.test_inputs import names
from tests.test_walk import batches


def read(model, data, modules) -> dict[str, list[torch.Tensor]]:
    """What each module reads in a whole forward, the real tokens of each batch."""
    seen, handles = {name: [] for name in modules}, []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0])))
    for batch in data:
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: [x.reshape(-1, x.shape[-1])[batch["attention_mask"].bool().reshape(-1)]
                   for x, batch in zip(found, data, strict=True)] for name, found in seen.items()}


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "opt", "gemma2", "mixtral"])
@torch.no_grad()
def test_the_second_stream_never_sees_an_edit(family):
    model, data, compared = tiny.make(family), batches(), 0
    wanted = {}
    for block in blocks(model):
        wanted |= read(model, data, places(block, names(model), residual=True))
    for visit in visits_beside(model, Run(data), "x", lambda block: places(block, names(model), residual=True)):
        for name, found in visit.dense.items():
            assert all(torch.equal(a, b) for a, b in zip(found, wanted[name], strict=True)), name
            compared += 1
        for p in visit.block.projections():
            p.write(p.weight * 0.9)
    stream = 2 * (family in ("llama", "gpt2", "opt")) + (family == "mixtral")       # norms in front of what adds to it
    assert compared == len(wanted) == 3 * (len(blocks(model)[0].groups()) + stream)


@pytest.mark.parametrize("weighed", [False, True])
@torch.no_grad()
def test_what_is_missing_is_the_difference_of_the_streams(weighed):
    """By hand from forwards of both models; and the pull is the answer of least squares to it."""
    model, dense, data = tiny.make("llama", norms=True), tiny.make("llama", norms=True), batches()
    weights = [torch.rand(int(b["attention_mask"].sum())) if weighed else None for b in data]
    inputs = Inputs("moments", dense="residual", token_weights=(lambda visit, run: weights) if weighed else None)
    r = torch.cat(weights).unsqueeze(1) if weighed else torch.ones(89, 1)
    for index, (p, seen) in enumerate(each_weight(model, Run(data), names(model), "x", inputs)):
        if index in (9, 10, 11, 13):                                # of block 1: v, o, gate, down
            block, own = (blocks(each)[1] for each in (model, dense))
            at = {"x": p.module, "o": block.module, "down": block.norms["ffn_in"].module}
            like = {"x": own.projections()[index - 7].module, "o": own.module, "down": own.norms["ffn_in"].module}
            now, then = ({name: torch.cat(x) for name, x in read(each, data, of).items()}
                         for each, of in ((model, at), (dense, like)))
            lack = then["x"] - now["x"]
            if seen.missing.of_outputs:
                stream = "o" if index == 10 else "down"
                lack = lack @ p.weight.T + then[stream] - now[stream]
            torch.testing.assert_close(seen.missing.matrix, 2 / 89 * (r * lack).T @ now["x"],
                                       rtol=1e-3, atol=1e-4)
            lack = lack if seen.missing.of_outputs else lack @ p.weight.T
            best = torch.linalg.lstsq((r.sqrt() * now["x"]).double(), (r.sqrt() * lack).double(), driver="gelsd")
            found = gptq.pull(p.weight, seen, 1e-6)
            left, least, all_of_it = (float((r * (lack - now["x"] @ pull.T).square()).sum()) for pull in
                                      (found, best.solution.T.float(), torch.zeros_like(found)))
            assert left <= least * 1.02 + 1e-3 * all_of_it < 0.9 * all_of_it
            moments, cross = seen.hessian.double(), seen.missing.matrix.double()
            moments.diagonal().add_(0.3 * moments.diagonal().mean())
            wanted = torch.linalg.solve(moments, (cross if seen.missing.of_outputs else p.weight.double() @ cross).T).T
            torch.testing.assert_close(gptq.pull(p.weight, seen, 0.3), wanted.float(), rtol=1e-3, atol=1e-5)
        p.write(p.weight * 0.9 + 0.02 * torch.randn(p.weight.shape, generator=torch.Generator().manual_seed(index)))


def test_nothing_is_missing_in_front_of_the_first_edit():
    one, two, data = tiny.make("llama"), tiny.make("llama"), batches()
    for model, targets in ((one, "dense"), (two, "weights")):
        GPTQ(bits=3, group_size=16, targets=targets).apply(model, Run(data))
    same = [torch.equal(a.weight, b.weight) for a, b in zip(blocks(one)[0].projections(), blocks(two)[0].projections(),
                                                            strict=True)]
    assert same == [True] * 3 + [False] * 4                         # q, k, v read the same; behind them all is new


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "olmo2"])
@torch.no_grad()
def test_dense_targets_bring_the_model_nearer_to_the_dense_one(family):
    data, away = batches(), {}
    expected = [tiny.make(family)(**batch, use_cache=False).logits for batch in data]
    for fields in ({"targets": "weights"}, {"residual": False}, {}):
        model = tiny.make(family)
        record = GPTQ(bits=3, group_size=16, sweeps=1, **fields).apply(model, Run(data))
        away[str(fields)] = sum(float((model(**batch, use_cache=False).logits - logits)[b["attention_mask"].bool()]
                                      .square().sum()) for b, batch, logits in zip(data, data, expected, strict=True))
        assert all(0 < m["output_error"] < m["weight_error"] for m in record.meta["modules"].values())
    weights, inputs, residual = away.values()
    assert inputs < 0.9 * weights and (residual < inputs if family == "llama" else residual == inputs)


def test_what_a_block_read_is_let_go_before_the_next_is_prepared(monkeypatch):
    """A dry run sees one block; what is left of it while the next one is gone through would come on top of that."""
    held, left, unedited = [], [], beside._Streams._unedited

    def watched(self, index):
        left.extend(ref for ref in held if ref() is not None)
        found = unedited(self, index)
        held.extend(weakref.ref(x) for some in (*found.values(), self.edited) for x in some)
        return found

    monkeypatch.setattr(beside._Streams, "_unedited", watched)
    GPTQ(bits=4, group_size=32).apply(tiny.make("llama", num_hidden_layers=2), Run(batches()))
    assert held and not left
