"""What dropping entries of contexts costs: held against a plain run, and told for what was asked."""
import json

import pytest
import torch
from click.testing import CliRunner
from llmopt_evals.continuations import cost, main, pieces
from torch.nn.functional import cross_entropy

import llmopt
from tests import tiny


@pytest.fixture
def made(tmp_path):
    lines = ["the owl has an old key and a new lamp", "one fox ate the red fig and ran"]
    tokenizer, model = tiny.tokenizer(lines), tiny.make("llama", vocab_size=500)
    llmopt.save(model, tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    rows = [{"context": line * 4, "question": " and", "answer": " then it slept"} for line in lines]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path, model, tokenizer


@torch.no_grad()
def test_the_answers_alone_count(made):
    folder, model, tokenizer = made
    texts = list(pieces(str(folder / "f.jsonl"), tokenizer, None))
    losses = []
    for context, rest, length in texts:
        assert context[0, 0] == tokenizer.bos_token_id
        logits = model(torch.cat([context, rest], 1)).logits[0, -length - 1:-1]
        losses.append(cross_entropy(logits, rest[0, -length:], reduction="none"))
    want = torch.cat(losses).mean().item()
    assert cost(model, texts) == (pytest.approx(want, abs=1e-5), 1.0)
    whole = cost(model, texts, llmopt.get("kv.keydiff")(budget=10_000))
    assert whole[0] == pytest.approx(want, abs=1e-5)
    less = cost(model, texts, llmopt.get("kv.keydiff")(ratio=0.5))
    assert less[0] != pytest.approx(want, abs=1e-3) and 0.45 < less[1] < 0.6


def test_every_method_has_its_line_and_an_unknown_one_is_refused(made):
    folder = made[0]
    given = [str(folder / "m"), str(folder / "f.jsonl"), "--limit", "1", "kv.keydiff",
             "kv.snapkv: {budget: 9, window: 3, allocate: ada}"]
    shown = CliRunner().invoke(main, given)
    lines = shown.stdout.strip().splitlines()
    assert shown.exit_code == 0 and [line.split("%")[1].strip() for line in lines[-3:]] == ["dense", *given[4:]]
    shown = CliRunner().invoke(main, [*given, "kv.snapkw"])
    assert shown.exit_code == 2 and "did you mean 'kv.snapkv'" in shown.output
