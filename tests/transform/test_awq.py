"""transform.awq: its scales, the error that it searches by, what it is good for."""
import pytest
import torch

from llmopt.calibration.walk import walk
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.model.links import Norm
from llmopt.quant import RTN
from llmopt.transform import AWQ
from llmopt.transform.awq import Search, mean_sizes, nearest, rounders, scales
from tests import tiny
from tests.test_inputs import batches
from tests.transform.test_rotate import logits


def test_scales_are_powers_of_the_sizes():
    sizes = torch.tensor([4., 1., 16.])
    torch.testing.assert_close(scales(sizes, 0.5), torch.tensor([1., .5, 2.]))
    torch.testing.assert_close(scales(sizes, 0), torch.ones(3))
    assert scales(torch.tensor([0., 1., 4.]), 0.5)[0] > 0


def test_sizes_are_of_real_tokens_and_of_all_who_read_a_channel():
    model, data = tiny.make("llama"), batches()
    visit = next(walk(model, data))
    sizes, seen = mean_sizes(visit), []
    visit.observe({"model.layers.0.self_attn.o_proj": lambda x: seen.append(x.clone())})
    expected = torch.cat(seen).abs().mean(0)                                        # [H D], two heads read one of v
    torch.testing.assert_close(sizes["model.layers.0.self_attn.o_proj"].float(), expected, rtol=1e-5, atol=1e-6)
    link = next(link for link in visit.block.links() if link.readers[0] is visit.block.attn_out)
    by_hand = expected.view(2, 2, 16).mean(1).flatten()
    torch.testing.assert_close(link.by_channel(expected), by_hand)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_error_is_what_rounding_the_scaled_readers_does_to_the_block(family):
    """Padding left out; a Conv1D's weight lies the other way round."""
    model, data, step = tiny.make(family), batches(), RTN(bits=3, group_size=16)
    visit = next(walk(model, data))
    link = next(link for link in visit.block.links() if isinstance(link.producer, Norm))
    search, factor = Search(visit, rounders(model, Run(ahead=(step,))), 2), torch.linspace(.5, 2, 64)
    wanted, told = [visit.forward(i) for i in range(2)], search.error(link, factor)
    for reader in link.readers:
        reader.write(search.rounders[reader.name](reader.weight * factor) / factor)
    by_hand = [(visit.forward(i) - wanted[i])[data[i]["attention_mask"].bool()].square().sum() for i in range(2)]
    assert told == pytest.approx(float(sum(by_hand)), rel=1e-4)


def test_the_grid_is_that_of_the_step_to_come():
    model = tiny.make("llama")
    weight = blocks(model)[0].ffn_out.weight
    plan = RTN(bits=4, group_size=16, overrides={"down_proj": {"bits": 2}}, ignore=["q_proj"])
    found = rounders(model, Run(ahead=(plan,)))
    assert "model.layers.0.self_attn.q_proj" not in found
    assert len(found["model.layers.0.mlp.down_proj"](weight)[0, :16].unique()) <= 4
    assert len(rounders(model, Run())) == 3 * 7
    assert nearest(torch.tensor([[7.5, -2.4, 0.6]])).tolist() == [[7., -2., 1.]]


def test_large_inputs_are_rounded_more_finely():
    """Four channels with large inputs: at 3 bits q, k and v do less than half of the damage to the block."""
    errors = {}
    for prepared in (False, True):
        model = tiny.make("llama", num_hidden_layers=1)
        for block in blocks(model):
            for norm in block.norms.values():
                norm.module.weight.data[[3, 17, 40, 61]] = 40
        expected, step = logits(model), RTN(bits=3, group_size=32)
        if prepared:
            record = AWQ().apply(model, Run(batches(), ahead=(step,)))
            torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
            chosen = [entry for block in record.meta["blocks"] for entry in block.values()]
            assert len(chosen) == 4 and all(0 <= e["ratio"] < 1 and e["error"] <= 1 for e in chosen)
        step.apply(model, Run())
        errors[prepared] = float((logits(model) - expected).square().mean())
    assert chosen[0]["ratio"] > 0.3 and chosen[0]["error"] < 0.5
    assert errors[True] < 0.75 * errors[False]
