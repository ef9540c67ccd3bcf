"""prune.experts: scores by hand, what stays, every Mixture-of-Experts architecture, routers in groups, bad input."""
import pytest
import torch
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModelForCausalLM

import llmopt
from llmopt.errors import LlmoptError
from llmopt.method import Run
from llmopt.model.blocks import layer_list
from llmopt.model.experts import experts_of
from llmopt.prune import ExpertPruner
from tests import tiny

CONTRACT = {"ratio": 0.5}
KINDS = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe", "phimoe", "granitemoe", "minimax_m2", "ernie4_5_moe",
         "dots1", "glm4_moe", "deepseek_v2", "deepseek_v3", "flex_olmo", "qwen3_next", "qwen3_5_moe_text", "jamba",
         "lfm2_moe", "llama4_text"]
QUICK = {"gpt_oss", "ernie4_5_moe", "lfm2_moe", "deepseek_v3", "llama4_text"}


def data(rows=4, length=24, padded=0):
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, length - padded:] = 0
    return [{"input_ids": tiny.ids(rows, length), "attention_mask": mask}]


def by_hand(model, batch):
    """Of the second layer: (tokens routed to each expert, REAP)."""
    block, seen = model.model.layers[1].mlp, []
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
        handle.remove()
        x = seen[0][batch["attention_mask"].bool()]
        chances = (x @ block.gate.weight.T).softmax(-1)
        count, total = [0] * 4, [0.0] * 4
        for token, row in zip(x, chances, strict=True):
            chosen = row.topk(2).indices.tolist()
            for expert in chosen:
                gate, up = (block.experts.gate_up_proj[expert] @ token).chunk(2)
                answer = block.experts.down_proj[expert] @ (silu(gate) * up)
                count[expert] += 1
                total[expert] += float(row[expert] / row[chosen].sum() * answer.norm())
    return count, [size / max(1, n) for size, n in zip(total, count, strict=True)]


def test_scores_by_hand_and_what_stays_is_what_was():
    model, dense = tiny.make("qwen3_moe"), tiny.make("qwen3_moe")
    batch = data(padded=9)
    tokens, reap = by_hand(dense, batch[0])
    told = ExpertPruner(ratio=0.5).apply(model, Run(batch)).meta
    assert told["experts"]["1"]["tokens"] == tokens and sum(tokens) == 2 * (4 * 24 - 9)
    assert told["experts"]["1"]["scores"] == pytest.approx(reap, rel=1e-4)
    kept = sorted(sorted(range(4), key=lambda expert: -reap[expert])[:2])
    assert told["experts"]["1"]["kept"] == kept
    mine, theirs = model.model.layers[1].mlp, dense.model.layers[1].mlp
    assert torch.equal(mine.gate.weight, theirs.gate.weight[kept])
    assert torch.equal(mine.experts.down_proj, theirs.experts.down_proj[kept])
    assert (model.config.num_experts, model.config.num_experts_per_tok, mine.gate.top_k) == (2, 2, 2)
    assert told["removed_units"] == {"experts": 6} and told["removed_share"] == 0.5
    frequent = ExpertPruner(ratio=0.25, criterion="frequency").apply(tiny.make("qwen3_moe"), Run(batch)).meta
    assert set(range(4)) - set(frequent["experts"]["1"]["kept"]) == {tokens.index(min(tokens))}


def test_weights_alone_and_chance():
    model = tiny.make("mixtral")
    model.model.layers[2].mlp.experts.down_proj.data[0] *= 3
    told = ExpertPruner(ratio=0.5, criterion="magnitude").apply(model, Run()).meta
    assert told["experts"]["2"]["kept"] == [0] and "tokens" not in told["experts"]["2"]
    drawn = [[one["kept"] for one in ExpertPruner(ratio=0.5, criterion="random", seed=seed).apply(
        tiny.make("qwen3_moe"), Run()).meta["experts"].values()] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_expert_that_no_token_reached_leaves_first_and_is_told():
    model = tiny.make("mixtral")
    model.model.layers[0].mlp.gate.weight.data[0] = 0                  # its logit is 0, the other's above it
    model.model.layers[0].post_attention_layernorm.weight.data[:] = 0
    model.model.layers[0].post_attention_layernorm.weight.data[0] = 1
    model.model.embed_tokens.weight.data[:, 0] = 5
    model.model.layers[0].mlp.gate.weight.data[1] = 1
    told = ExpertPruner(ratio=0.5).apply(model, Run(data())).meta
    assert told["experts"]["0"]["tokens"] == [0, 96] and told["experts"]["0"]["kept"] == [1] and told["unseen"] >= 1


@pytest.mark.parametrize("family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.full)
                                    for name in KINDS])
def test_every_architecture_loses_half_of_them_and_is_loaded_again(family, tmp_path):
    model = tiny.make(family)
    before = [found.count for layer in layer_list(model) if (found := experts_of(layer, "")) is not None]
    told = llmopt.compress(model, [ExpertPruner(ratio=0.5)], data()).records[0]["meta"]
    assert told["removed_units"]["experts"] == sum(before) // 2 > 0
    llmopt.save(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(again(tiny.ids()).logits, model(tiny.ids()).logits, rtol=0, atol=1e-5)
    assert again.num_parameters() == told["parameters"][1]


def test_groups_of_experts_lose_as_many_each():
    config = tiny.make("deepseek_v3").config.to_dict() | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **{
        key: value for key, value in config.items() if key != "model_type"})).eval()
    told = ExpertPruner(ratio=0.25).apply(model, Run(data())).meta
    for one in told["experts"].values():
        assert sum(expert < 4 for expert in one["kept"]) == sum(expert >= 4 for expert in one["kept"]) == 3
    assert model.config.n_routed_experts == 6 and model(tiny.ids()).logits.isfinite().all()
    with pytest.raises(LlmoptError, match="at least 4 have to stay, ratio 0.333 at most"):
        ExpertPruner(ratio=0.7).apply(model, Run(data()))


@pytest.mark.parametrize(("family", "fields", "said"), [
    ("llama", {}, "llama: experts cannot be pruned: it has none"),
    ("qwen3_moe", {"ratio": 0.75}, "ratio 0.75 leaves 1 of 4 experts, and the router chooses 2 .* ratio 0.5 at most"),
    ("qwen3_moe", {"ratio": 0.1}, "ratio 0.1 is less than one of 4 experts")])
def test_what_cannot_leave_is_named(family, fields, said):
    model = tiny.make(family)
    with pytest.raises(LlmoptError, match=said):
        ExpertPruner(**fields).apply(model, Run(data()))
    with pytest.raises(LlmoptError, match="calibration data .* magnitude does without"):
        ExpertPruner().apply(tiny.make("qwen3_moe"), Run())


def test_experts_that_are_given_their_rows_are_known_where_a_token_goes_to_one():
    with pytest.raises(LlmoptError, match=r"layers\.1\.feed_forward\.experts: each token goes to 2 of these experts"):
        ExpertPruner(ratio=0.5).apply(tiny.make("llama4_text", num_experts_per_tok=2), Run(data()))


def test_a_router_without_a_row_for_each_expert_is_named():
    model = tiny.make("qwen3_moe")
    model.model.layers[2].mlp.gate.weight.data = torch.zeros(5, 64)
    with pytest.raises(LlmoptError, match=r"layers\.2\.mlp\.experts: beside its 4 experts there is no router"):
        ExpertPruner(ratio=0.5, criterion="magnitude").apply(model, Run())
    assert model.config.num_experts == model.model.layers[0].mlp.experts.num_experts == 4           # nothing is cut
