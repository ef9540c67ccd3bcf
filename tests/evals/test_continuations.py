"""What dropping entries of contexts costs: held against a plain run, and told for what was asked."""
import json

import pytest
import torch
from click.testing import CliRunner
from llmopt_evals import padding, pieces
from llmopt_evals.continuations import costs, main, texts_of
from torch.nn.functional import cross_entropy

import llmopt
from llmopt.method import Record
from tests import tiny

LINES = ["the owl has an old key and a new lamp", "one fox ate the red fig and ran"]


@pytest.fixture
def made(tmp_path):
    tokenizer, model = tiny.tokenizer(LINES), tiny.make("llama", vocab_size=500)
    llmopt.save(model, tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    rows = [{"context": line * 4, "question": question, "answer": " then it slept"}
            for line in LINES for question in (" and", "")]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path, model, tokenizer


def trial(name, **fields):
    return ((llmopt.get(name)(**fields), Record()),)


@torch.no_grad()
def test_the_answers_alone_count_and_lines_of_one_context_are_asked_of_one_cache(made):
    folder, model, tokenizer = made
    texts = list(texts_of(str(folder / "f.jsonl"), tokenizer, None))
    losses, right = [], 0
    for context, asked in texts:
        assert context[0, 0] == tokenizer.bos_token_id and len(asked) == 2
        for rest, length in asked:
            logits, answer = model(torch.cat([context, rest], 1)).logits[0, -length - 1:-1], rest[0, -length:]
            losses.append(cross_entropy(logits, answer, reduction="none"))
            right += bool((logits.argmax(-1) == answer).all())
    want = torch.cat(losses).mean().item()
    trials = [(), trial("kv.keydiff", budget=10_000), trial("kv.keydiff", ratio=0.5)]
    dense, whole, less = costs(model, texts, trials)
    assert dense.nats == pytest.approx(want, abs=1e-5) and whole.nats == pytest.approx(want, abs=1e-5)
    assert (dense.exact, dense.asked, dense.held) == (right, 4, dense.dense)
    assert less.nats != pytest.approx(want, abs=1e-3) and 0.48 < less.part < 0.6
    assert less.beside > 0


@torch.no_grad()
def test_a_context_costs_what_it_costs_when_it_is_read_with_the_method_attached(made):
    folder, model, tokenizer = made
    text = next(texts_of(str(folder / "f.jsonl"), tokenizer, 1))
    method, (rest, length) = llmopt.get("kv.snapkv")(ratio=0.5, window=3), text.asked[0]
    with llmopt.runtime.attached(model, method):
        cache = model(text.context, use_cache=True).past_key_values
        with llmopt.runtime.frozen(model):
            logits = model(rest[:, :-1], past_key_values=cache).logits[0, -length:]
    want = cross_entropy(logits, rest[0, -length:]).item()
    assert costs(model, [text], [trial("kv.snapkv", ratio=0.5, window=3)])[0].nats == pytest.approx(want, abs=1e-5)


def test_every_method_has_its_line_and_an_unknown_one_is_refused(made):
    folder = made[0]
    given = [str(folder / "m"), str(folder / "f.jsonl"), "--limit", "1", "--ratio", "0.5", "--ratio", "0.9",
             "kv.keydiff", "kv.snapkv: {budget: 9, window: 3, allocate: ada}"]
    shown = CliRunner().invoke(main, given)
    lines = [line.split("%")[-1].strip() for line in shown.stdout.strip().splitlines()]
    assert shown.exit_code == 0 and lines[-4:] == ["dense", "0.50  kv.keydiff", "0.90  kv.keydiff", given[-1]]
    for wrong, words in (("kv.snapkw", "did you mean 'kv.snapkv'"), ("kv.keydiff: {demote: 0.5}", "--data FILE")):
        shown = CliRunner().invoke(main, [*given, wrong])
        assert shown.exit_code == 2 and words in shown.output


def test_pieces_of_texts_are_what_continuations_reads(made):
    folder, _, tokenizer = made
    (folder / "long.txt").write_text(" ".join(LINES * 10))
    given = [str(folder / "m"), str(folder / "p.jsonl"), str(folder / "long.txt"), "--each", "3", "--context", "20"]
    shown = CliRunner().invoke(pieces.main, [*given, "--answer", "5"])
    assert shown.exit_code == 0, shown.output
    ids = tokenizer(" ".join(LINES * 10), add_special_tokens=False).input_ids
    rows = [json.loads(line) for line in (folder / "p.jsonl").read_text().splitlines()]
    starts = [0, len(ids) // 3, 2 * (len(ids) // 3)]
    assert [row["context"] for row in rows] == [tokenizer.decode(ids[start:start + 20]) for start in starts]
    assert [row["answer"] for row in rows] == [tokenizer.decode(ids[start + 20:start + 25]) for start in starts]
    assert CliRunner().invoke(pieces.main, [*given, "--answer", "0"]).exit_code == 0
    assert [json.loads(line) for line in (folder / "p.jsonl").read_text().splitlines()] == [
        {"text": row["context"]} for row in rows]
    refused = CliRunner().invoke(pieces.main, [*given, "--answer", "5000"])
    assert refused.exit_code == 2 and "long.txt" in refused.output and "3 x 5,020 are wanted" in refused.output


def test_a_padded_row_goes_on_as_alone_and_is_told_where_it_does_not(made, monkeypatch):
    folder = made[0]
    (folder / "t.txt").write_text(" ".join(LINES * 30))
    given = [str(folder / "m"), str(folder / "t.txt"), "kv.keydiff", "kv.snapkv: {ratio: 0.7, window: 8}"]
    shown = CliRunner().invoke(padding.main, given)
    assert shown.exit_code == 0, shown.output
    assert [(line[:4], line.rpartition(": ")[2]) for line in shown.stdout.splitlines()[:2]] == [
        ("1.00", "dense"), ("1.00", "kv.keydiff, ratio 0.5")] and shown.stdout.splitlines()[2].startswith("1.00")
    other = torch.tensor([[1, 2, 3, 4], [9, 9, 9, 9]])
    monkeypatch.setattr(padding, "following", lambda model, ids, *_: other[:1] * 0 + 1 if len(ids) == 1 else other)
    assert padding.alike(None, torch.zeros(1, 440, dtype=torch.long), None) == 0.25
    (folder / "t.txt").write_text("too short")
    refused = CliRunner().invoke(padding.main, given)
    assert refused.exit_code == 2 and "440 are wanted" in refused.output
