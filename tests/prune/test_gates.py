"""prune.fisher and prune.taylor: slopes against whole backward passes, exact invariances, what leaves first."""
import pytest
import torch

from llmopt.calibration.backward import backward
from llmopt.calibration.losses import target_shares
from llmopt.errors import FieldError, LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.prune import Fisher, Taylor
from llmopt.prune.groups import members
from tests import tiny


def data(rows=5, length=12, batch=2):
    ids, mask = tiny.ids(rows, length), torch.ones(rows, length, dtype=torch.long)
    mask[1, 8:] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(batch), mask.split(batch), strict=True)]


def loss(model, batch):
    """The sum over the samples of their mean losses, the plain way."""
    logs = model(**batch, use_cache=False).logits[:, :-1].log_softmax(-1)
    right = logs.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return -(right * target_shares(batch["attention_mask"])).sum()


def by_weights(model, batch, pick):
    """sum over lines of w dL/dw of the weights that `pick` gives for each block: L tensors [lines]."""
    model.requires_grad_(True)
    found = [pick(block) for block in blocks(model)]
    slopes = torch.autograd.grad(loss(model, batch), [weight for weight, _ in found])
    return [(weight * slope).sum(dim) for (weight, dim), slope in zip(found, slopes, strict=True)]


def slopes(model, batches, wanted):
    """The gates' slopes of every batch, summed over it, of the unit's writers: L lists of [units]."""
    ends = [members(block, wanted)[-1] for block in blocks(model)]
    found = {end.projection.name: [] for end in ends}
    index = {end.projection.name: end.index for end in ends}

    def see(place, x, slope):
        found[place.name].append((x * slope)[..., index[place.name]].sum((0, 1, -1)))

    backward(model, Run(batches=batches), "slopes", lambda block: [ends[block.index].projection], see)
    return list(found.values())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_gates_slope_is_the_sum_of_weight_times_gradient_of_its_columns_and_of_its_row_of_up(family):
    model, batches = tiny.make(family, torch.float64), data()
    down = [by_weights(model, batch, lambda b: (b.ffn_out.module.weight, 0)) for batch in batches]
    up = [by_weights(model, batch, lambda b: (b.part("up")[0].module.weight, 1)) for batch in batches]
    out = [by_weights(model, batch, lambda b: (b.attn_out.module.weight, 0)) for batch in batches]
    modes = [p.requires_grad for p in model.parameters()]
    for layer, (ffn, groups) in enumerate(zip(slopes(model, batches, "ffn"), slopes(model, batches, "kv_groups"),
                                              strict=True)):
        for number in range(len(batches)):
            torch.testing.assert_close(ffn[number], down[number][layer], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(ffn[number], up[number][layer], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(groups[number], out[number][layer].view(2, -1).sum(1), rtol=1e-9, atol=1e-9)
    assert modes == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("family", ["gpt2", "opt", "phi3", "mixtral"])
def test_scores_are_those_of_samples_one_by_one(family):
    """With biases, fused weights, Conv1D and experts; padding and the division into batches do not matter."""
    unit = "kv_groups" if family == "mixtral" else "ffn"
    model, rows = tiny.make(family, torch.float64), [{k: v[:1] for k, v in b.items()} for b in data(3, batch=1)]
    if family == "mixtral":
        model.set_experts_implementation("eager")               # grouped ones know no float64
    rows[1] = {"input_ids": rows[1]["input_ids"][:, :8], "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    alone = [torch.stack(found) for found in slopes(model, rows, unit)]                         # L of [samples, units]
    for method, want in ((Fisher, [s.square().mean(0) for s in alone]), (Taylor, [s.abs().mean(0) for s in alone]),
                         (Fisher, None)):
        found = method(units=[unit], over="batch" if want is None else "sequence").rate_all(
            model, Run(batches=data(3, batch=3)))
        want = want or [s.sum(0).square() for s in alone]
        for layer in range(3):
            torch.testing.assert_close(found[layer][unit], want[layer], rtol=1e-7, atol=1e-12)


def test_by_token():
    model, tokens = tiny.make("llama", torch.float64), []
    writer = blocks(model)[2].ffn_out
    backward(model, Run(batches=data()), "slopes", lambda block: [block.ffn_out], lambda place, x, slope: tokens.append(
        (x * slope).flatten(0, 1)) if place.name == writer.name else None)
    every = torch.cat(tokens)
    assert len(every) == 60 and int((every == 0).all(1).sum()) == 4 + 5         # padding, and each row's last token
    count = 60 - 4
    for method, want in ((Fisher, every.square().sum(0) / count), (Taylor, every.abs().sum(0) / count)):
        found = method(units=["ffn"], over="token").rate_all(model, Run(batches=data()))[2]["ffn"]
        torch.testing.assert_close(found, want)


@torch.no_grad()
def test_a_scale_moved_from_up_to_down_changes_nothing_and_a_dead_unit_leaves_first():
    model, run = tiny.make("llama", torch.float64), Run(batches=data())
    before = Fisher().rate_all(model, run)
    up, down = blocks(model)[1].part("up")[0].weight, blocks(model)[1].ffn_out.weight
    up[7] *= 5
    down[:, 7] /= 5
    after = Fisher().rate_all(model, run)
    for layer in range(3):
        for unit in ("ffn", "kv_groups"):
            torch.testing.assert_close(before[layer][unit], after[layer][unit])
    blocks(model)[0].ffn_out.weight[:, 30] = 0
    blocks(model)[2].attn_out.weight[:, 32:] = 0
    for method in (Fisher(ratio=0.2, scope="global", refit=False), Taylor(ratio=0.5, refit=False)):
        dead = method.rate_all(model, run)
        assert dead[0]["ffn"][30] == dead[2]["kv_groups"][1] == 0 < dead[0]["ffn"].median()
        plan, _ = method.plan(model, run)
        assert 30 not in plan[0].ffn and plan[2].kv_groups.tolist() == [0]


def test_what_cannot_be_is_named():
    with pytest.raises(FieldError, match="prune.fisher does not compare blocks"):
        Fisher(units=["blocks"])
    with pytest.raises(LlmoptError, match="needs calibration data"):
        Taylor().apply(tiny.make("llama"), Run())
    model = tiny.make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(float("inf"))
    with pytest.raises(LlmoptError, match="model.layers.0: the scores of its ffn are not finite"):
        Fisher(units=["ffn"]).apply(model, Run(batches=data()))
