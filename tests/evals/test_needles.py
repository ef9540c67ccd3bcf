"""Needles: planted where they should be, within the length, the same every time; asked of one finished cache or not."""
import pytest
import torch
from llmopt_evals import needles
from llmopt_evals.evaluate import evaluate, figures
from llmopt_evals.needles import Plan, Writer, asked, fact, plant, rows

import llmopt
from llmopt.errors import LlmoptError
from tests import tiny

TEXT = "The river is wide. A boat came by in the morning, and nobody saw it. Was it late? It was not. " * 3
OPTIONS = {"lengths": [220], "documents": 2, "needles": 3}


@pytest.fixture(scope="module")
def tokenizer():
    lines = [TEXT, *(fact("amber falcon", code) + asked("amber falcon", form) for code in (1234, 5678)
                     for form in needles.LEAD)]
    return tiny.tokenizer(lines)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text(TEXT)
    return str(path)


def test_a_needle_stands_behind_the_sentence_nearest_its_depth():
    assert plant(["a.", "b.", "c.", "d."], ["X", "Y"], [0.25, 0.7], [2, 2, 2, 2]) == "a. X b. c. Y d."


def test_documents_fill_their_length_and_hold_all_needles_in_order(tokenizer):
    writer = Writer([TEXT], tokenizer, Plan(needles=4))
    text, planted = writer.document(0, 240)
    places = [text.index(fact(subject, code)) / len(text) for subject, code, _ in planted]
    assert places == pytest.approx([depth for _, _, depth in planted], abs=0.2)
    whole = text + asked(planted[0][0], "agnostic") + f" {planted[0][1]}"
    assert 170 < len(tokenizer(whole)["input_ids"]) <= 240
    assert Writer([TEXT], tokenizer, Plan(needles=4)).document(0, 240) == (text, planted)
    assert Writer([TEXT], tokenizer, Plan(needles=4, seed=1)).document(0, 240) != (text, planted)


def test_needles_are_written_as_probes(tokenizer, file, tmp_path):
    from click.testing import CliRunner

    from llmopt.calibration.probes import load

    model = tiny.make("llama", vocab_size=len(tokenizer))
    llmopt.save(model, tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    words = ("--text", file, "--model", tmp_path / "m", "--lengths", "220", "--documents", "2", "--needles", "3")
    done = CliRunner().invoke(needles.command, [*map(str, words), "--probes", str(tmp_path / "p.jsonl")])
    assert (done.exit_code, done.output) == (0, "")
    found = load(str(tmp_path / "p.jsonl"), 99, 0, 0, model.config, tokenizer)
    assert len(found) == 6
    for probe in found:
        told = tokenizer.decode(probe.ids)
        assert probe.needle is not None and told.count(tokenizer.decode(probe.answer)) == 2
        assert not torch.equal(probe.corrupted, probe.context) and len(probe.corrupted) == len(probe.context)


@pytest.mark.parametrize(("options", "fact"), [
    ({"lengths": [600]}, "a length of 600 tokens; the model reads at most 512"), ({"needles": 0}, "needles: 0 given"),
    ({"lengths": [100]}, "leave no room for text"), ({"lengths": ["many"]}, "lengths: 'many' given")], ids=str)
def test_a_plan_that_cannot_be_is_one_line(tokenizer, file, options, fact):
    with pytest.raises(LlmoptError, match=fact):
        list(rows("aware", file, reader=lambda: (tokenizer, 512), **options))


def test_agnostic_questions_are_asked_of_one_finished_cache(tokenizer, file):
    model, prefills = tiny.make("llama", vocab_size=len(tokenizer)), []
    dense = figures(evaluate(model, ["needles"], tokenizer, text=file, options=OPTIONS))
    handle = model.get_decoder().register_forward_pre_hook(
        lambda m, args, kwargs: prefills.append(args[0] if args else kwargs["input_ids"]), with_kwargs=True)
    with llmopt.attached(model, llmopt.kv.SnapKV(budget=4096)):
        whole = figures(evaluate(model, ["needles"], tokenizer, text=file, options=OPTIONS))
    handle.remove()
    contexts = [ids for ids in prefills if ids.shape[1] > 100]
    assert len(contexts) == 2 * 3 + 2                       # a prefill for each aware question, one for each document
    assert [row[:2] for row in whole] == [row[:2] for row in dense]
    assert torch.allclose(torch.tensor([row[2] for row in whole]), torch.tensor([row[2] for row in dense]), rtol=1e-4)
    with llmopt.attached(model, llmopt.kv.Streaming(budget=16)):
        evicted = figures(evaluate(model, ["needles"], tokenizer, text=file, options=OPTIONS))
    assert evicted != dense
