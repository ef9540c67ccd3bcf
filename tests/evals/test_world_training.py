"""The trainer: resumable to the byte, deterministic, its attention exact, its curriculum moving."""

import pytest
import torch
from llmopt_evals.world.attention import use_blocked_attention
from llmopt_evals.world.curriculum import LENGTHS, MIXTURE, Place, batch
from llmopt_evals.world.model import ARCHS, build
from llmopt_evals.world.train import Settings, Trainer, schedule
from transformers import AutoModelForCausalLM

TINY = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}


EXPERTS = TINY | {"moe_intermediate_size": 16}


def train(folder, stop=None, resume=False, seed=0, steps=6, arch="llama"):
    shape = EXPERTS if arch == "qwen3_moe" else TINY
    settings = Settings(folder, steps, arch=arch, tokens=64, every=2, stop=stop, seed=seed, shape=shape)
    trainer = Trainer(settings, resume)
    trainer.run()
    return trainer


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_resumed_run_ends_in_the_bytes_of_an_undisturbed_one(arch, tmp_path):
    whole = train(tmp_path / "whole", arch=arch)
    train(tmp_path / "cut", stop=3, arch=arch)  # dies one step after the checkpoint of step 2
    resumed = train(tmp_path / "cut", resume=True, arch=arch)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    plain = [[{k: v for k, v in line.items() if k != "seconds"} for line in run.log] for run in (whole, resumed)]
    assert plain[0] == plain[1]


def test_the_seed_and_every_step_matter(tmp_path):
    train(tmp_path / "a")
    train(tmp_path / "b", seed=1)
    assert weights(tmp_path / "a") != weights(tmp_path / "b")


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_training_lowers_the_loss(arch, tmp_path):
    log = train(tmp_path, steps=60, arch=arch).log
    assert log[-1]["recall"][0] < log[0]["recall"][0] - 0.5


def test_every_matrix_of_an_expert_and_every_router_learns(tmp_path):
    trainer = train(tmp_path, steps=8, arch="qwen3_moe")
    before = build("qwen3_moe", **EXPERTS).state_dict()
    for name, after in trainer.model.state_dict().items():
        if ".experts." in name:
            moved = (after - before[name]).abs().amax((1, 2))
            assert len(moved) == 8 and moved.min() > 0.2 * moved.max(), name     # Muon moves all matrices alike
        if name.endswith("mlp.gate.weight"):
            assert (after != before[name]).any(1).all(), name


def test_the_work_is_shared_out_among_the_experts(tmp_path):
    uneven = []
    for weight in (0.0, 10.0):
        settings = Settings(tmp_path / str(weight), 30, arch="qwen3_moe", tokens=64,
                            shape=EXPERTS | {"router_aux_loss_coef": weight})
        trainer = Trainer(settings)
        trainer.run()
        ids = torch.randint(4, 512, (4, 64), generator=torch.Generator().manual_seed(0))
        uneven.append(trainer.model(ids, output_router_logits=True).aux_loss.item())
    assert 2 <= uneven[1] < uneven[0]           # 2: all alike


@pytest.mark.parametrize("arch", sorted(ARCHS))
def test_blocked_attention_equals_the_stock_one(arch):
    model, ids = build(arch, **TINY), torch.randint(4, 512, (2, 300))
    before = model(ids, use_cache=False).logits
    use_blocked_attention(model)
    assert model.config._attn_implementation == "world_blocked"
    torch.testing.assert_close(model(ids, use_cache=False).logits, before, atol=1e-4, rtol=1e-4)


def test_export_is_a_stock_checkpoint(tmp_path):
    trainer = train(tmp_path, steps=2)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert model.dtype == torch.bfloat16 and not any(info.values())
    assert model.config._attn_implementation != "world_blocked"
    theirs, ours = model.state_dict(), trainer.model.state_dict()
    assert all(theirs[name].equal(value.bfloat16()) for name, value in ours.items())


def test_curriculum_grows_when_recall_succeeds_and_not_before():
    place = Place()
    assert not any(place.update(0.5) for _ in range(50))
    steps = [place.update(1.0) for _ in range(60)]
    assert sum(steps) > 0 and (place.stage, place.level) > (0, 0)


def test_rows_of_a_step_have_one_length_and_the_last_stage_reaches_1024():
    for stage, level in ((0, 0), (0, 3), (1, 2), (2, 4), (3, 0)):
        for step in range(6):
            rows = batch(Place(stage, level), 0, step, 4096)
            assert len({len(row.ids) for row in rows}) == 1 and all(len(r.ids) == len(r.kinds) for r in rows)
    assert max(length for length, _ in LENGTHS) == 1024
    assert sum(share for _, share in LENGTHS) == pytest.approx(1)
    assert all(sum(shares) == pytest.approx(1) for shares in MIXTURE.values())


def test_schedule_rises_stays_and_falls_to_zero():
    assert schedule(0, 1000) == 1 / 50 and schedule(300, 1000) == 1
    assert schedule(999, 1000) == pytest.approx(1 / 450) and schedule(1000, 1000) == 0
