"""All five families in one run: what comes back from disk is what was in memory, and a second run writes the same."""
from pathlib import Path

import pytest
import torch
from llmopt_evals.evaluate import evaluate, figures
from llmopt_evals.world import calibration_ids

import llmopt
from llmopt import recipe
from llmopt.calibration import data
from llmopt.model.loading import load_dense
from llmopt.specs import ModelSpec
from tests.command import llmopt as command

WHOLE = ("steps.3.min_length=0", "steps.3.window=512",            # prompts here are short
         "eval.tasks=[world_ppl, world_facts, world_recall]")
SMALL = ("data.samples=8", "data.length=128", *WHOLE[:2], "eval.limit=6",
         "eval.tasks=[world_ppl, world_facts, world_recall_40_agnostic]")
TIMES = {"llmopt.log"}


def memory_and_disk(plan: recipe.Recipe, output: Path) -> tuple:
    """(the compressed model in memory, its tokenizer, the model that comes back from its folder)."""
    model, tokenizer = load_dense(plan.model)
    batches = data.load(plan.data, model.config, tokenizer)
    report = llmopt.compress(model, list(plan.steps), batches, plan.seed, tokenizer=tokenizer)
    llmopt.save(model, output, tokenizer, report=report, recipe=plan)
    return model, tokenizer, llmopt.load(output)[0]


@pytest.mark.parametrize("sets", [SMALL, pytest.param(WHOLE, marks=pytest.mark.full)], ids=["small", "whole"])
def test_everything_from_disk_equals_memory(tmp_path, sets):
    plan = recipe.load("everything", sets)
    model, tokenizer, fresh = memory_and_disk(plan, tmp_path / "out")
    ids = calibration_ids(2, 700, seed=9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fresh(ids).logits)
        first, second = (m(ids, use_cache=True).past_key_values for m in (model, fresh))
        assert first.nbytes() == second.nbytes() < 0.7 * 2 * 700 * 1536
        assert torch.equal(model.generate(ids, max_new_tokens=24), fresh.generate(ids, max_new_tokens=24))
    scored = [figures(evaluate(m, plan.eval.tasks, t, limit=plan.eval.limit, batch_size=plan.eval.batch_size))
              for m, t in ((model, tokenizer), (ModelSpec(id=str(tmp_path / "out")), None))]
    assert len(scored[0]) >= 3
    assert scored[0] == scored[1]


@pytest.mark.full
def test_the_same_recipe_twice_writes_the_same_bytes(tmp_path):
    words = ["compress", "--recipe", "everything", *(word for change in SMALL for word in ("--set", change))]
    folders = []
    for seed in ("1", "2"):                              # another order of every set, as in two processes of one user
        folders.append(tmp_path / f"out{seed}")
        run = command(*words, "--output", str(folders[-1]), PYTHONHASHSEED=seed)
        assert run.returncode == 0, run.stderr
    names = [sorted(p.name for p in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    assert {"eval-before.json", "eval-after.json", "model.safetensors", "llmopt.json"} <= set(names[0])
    different = [n for n in names[0] if (folders[0] / n).read_bytes() != (folders[1] / n).read_bytes()]
    assert set(different) <= TIMES, different
