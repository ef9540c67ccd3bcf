"""tokens of quant.gptq: how much a token counts, by hand; padding, and rows among other rows, change nothing."""
import pytest
import torch

from llmopt.calibration.walk import walk
from llmopt.errors import FieldError
from llmopt.method import Run
from llmopt.parts import get
from llmopt.quant import GPTQ
from llmopt.quant.tokens import ActivationNorm, FirstTokens, TokenFrequency
from tests import tiny

SCORED = ("attncon", "actnorm", "actdiff", "tokensim", "tokenfreq")


def batch(rows: list[int]) -> dict[str, torch.Tensor]:
    """Rows of so many tokens, the same tokens whatever the other rows are."""
    ids, mask = tiny.ids(len(rows), max(rows)), torch.zeros(len(rows), max(rows), dtype=torch.long)
    for i, length in enumerate(rows):
        mask[i, :length] = 1
        ids[i] = torch.randint(3, 96, (max(rows),), generator=torch.Generator().manual_seed(i))
    return {"input_ids": ids, "attention_mask": mask}


def visit_of(data, family="llama", **changes):
    return next(walk(tiny.make(family, **changes), [data]))


def test_scores_become_weights_between_least_and_one_over_their_mean():
    def counted(*scores, **fields):
        return ActivationNorm(**fields).counted(torch.tensor(scores)).tolist()

    assert counted(1., 3., 2., least=0.1) == pytest.approx([.1 / .55, 1 / .55, 1])
    assert counted(1., 3., 2., least=0.1, power=2) == pytest.approx([.01 / .4375, 1 / .4375, .3025 / .4375])
    r = [1, 1, .55, .1]
    assert counted(90., 3., 2., 1., least=0.1, sinks=1) == pytest.approx([each / .6625 for each in r])
    assert counted(1., 2., 3., 90., least=0, quantile=2 / 3) == pytest.approx([0, 0.8, 1.6, 1.6])
    for fields in ({}, {"least": 0}, {"sinks": 9}):
        assert counted(5., 5., 5., **fields) == [1, 1, 1] and counted(5., **fields) == [1] and counted(**fields) == []


def test_attention_is_summed_over_heads_and_queries():
    """Alike for all: token t draws sum_(i >= t) 1 / (i + 1) in each head; all of it together one per head and query."""
    data = batch([9, 6])
    model = tiny.make("llama", num_hidden_layers=1)
    model.model.layers[0].self_attn.q_proj.weight.data.zero_()
    sums = get("attncon", "token weight")().scores(next(walk(model, [data])), Run([data]))[0]
    for row, length in zip(sums, (9, 6), strict=True):
        by_hand = [4 * sum(1 / (i + 1) for i in range(t, length)) for t in range(length)]
        assert row[:length].tolist() == pytest.approx(by_hand)
        assert float(row[:length].sum()) == pytest.approx(4 * length)


def test_the_other_scores_by_their_formulas():
    data = batch([7])
    visit = visit_of(data)
    x, (y,) = visit.inputs[0][0], [out[0] for out in visit.outputs()]
    by_hand = {"actnorm": x.norm(dim=-1), "actdiff": -(y - x).norm(dim=-1),
               "tokensim": torch.stack([(x - one).square().sum(-1).mean() for one in x])}
    for name, expected in by_hand.items():
        found = get(name, "token weight")().scores(visit, Run([data]))[0][0]
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)


def test_rare_tokens_are_counted_in_all_data_though_a_process_sees_its_own():
    data = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.tensor([mask])} for ids, mask in
            (([5, 5, 6, 0], [1, 1, 1, 0]), ([5, 7, 6, 0], [1, 1, 1, 1]))]
    run = Run(data)
    run.__dict__["own_batches"] = data[1:]
    visit = next(walk(tiny.make("llama"), run.own_batches))
    assert TokenFrequency().scores(visit, run)[0].tolist() == [[-3, -1, -2, -1]]
    assert TokenFrequency(least=0).weights(visit, run)[0].tolist() == pytest.approx([0, 1.6, .8, 1.6])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("name", [*SCORED, "firstn"])
def test_a_padded_row_weighs_as_it_does_alone(name, family):
    both, alone = batch([24, 15]), batch([24, 15])
    alone = {key: value[1:, :15] for key, value in alone.items()}
    of = get(name, "token weight")()
    padded = of.weights(visit_of(both, family), Run([both]))[0]
    run = Run([both])
    run.__dict__["own_batches"] = [alone]
    single = of.weights(visit_of(alone, family), run)[0]
    assert len(padded) == 24 + 15 and len(single) == 15
    torch.testing.assert_close(padded[24:], single, rtol=1e-3, atol=1e-4)
    assert float(padded[:24].mean()) == pytest.approx(1) == float(single.mean())
    assert float(single.std()) > 0


def test_only_the_first_part_of_a_row_counts():
    assert FirstTokens(parts=4).first(8).tolist() == [4, 4, 0, 0, 0, 0, 0, 0]
    assert FirstTokens().first(3).tolist() == [3, 0, 0]


def test_gptq_takes_them_and_tokens_alike_change_nothing():
    """least: 1 counts all alike; a block without attention has no concentration."""
    data, made = [batch([24, 15]), batch([24])], {}
    for tokens in ("alike", {"attncon": {"least": 1}}, *SCORED, "firstn"):
        model = tiny.make("llama", num_hidden_layers=1)
        GPTQ(bits=3, group_size=16, tokens=tokens).apply(model, Run(data))
        made[str(tokens)] = model.model.layers[0].mlp.down_proj.weight
    alike = made.pop("alike")
    same = made.pop("{'attncon': {'least': 1}}")
    torch.testing.assert_close(same, alike)
    assert all(not torch.equal(weight, alike) for weight in made.values())
    visit = visit_of(data[0])
    visit.block.attention = None
    assert get("attncon", "token weight")().weights(visit, Run(data)) is None


def test_what_cannot_be_is_named():
    with pytest.raises(FieldError, match=r"tokens\.attncon\.least: 2 given"):
        GPTQ(tokens={"attncon": {"least": 2}})
    with pytest.raises(FieldError, match="attncon"):
        GPTQ(tokens="attcon")
