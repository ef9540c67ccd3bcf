"""Needles: planted where they should be, within the length, the same every time; asked of one finished cache or not."""
from random import Random

import pytest
import torch
from llmopt_evals import facts, needles
from llmopt_evals.evaluate import evaluate, figures
from llmopt_evals.needles import Plan, Writer, plant, rows

import llmopt
from llmopt.errors import LlmoptError
from tests import tiny

TEXT = "The river is wide. A boat came by in the morning, and nobody saw it. Was it late? It was not. " * 3
OPTIONS = {"lengths": [220], "documents": 2, "needles": 3}


@pytest.fixture(scope="module")
def tokenizer():
    lines = [TEXT, *(fact.told + fact.asked(lead) for fact in facts.drawn("mixed", 8, Random(7))
                     for lead in facts.LEAD)]
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
    places = [text.index(fact.told) / len(text) for fact, _ in planted]
    assert places == pytest.approx([depth for _, depth in planted], abs=0.2)
    whole = text + planted[0][0].asked("agnostic") + f" {planted[0][0].answer}"
    assert 170 < len(tokenizer(whole)["input_ids"]) <= 240
    assert Writer([TEXT], tokenizer, Plan(needles=4)).document(0, 240) == (text, planted)
    assert Writer([TEXT], tokenizer, Plan(needles=4, seed=1)).document(0, 240) != (text, planted)


def test_codes_are_what_they_always_were():
    fact, = facts.drawn("codes", 1, Random("0 1024 0"))
    assert fact.told == "The pass code of the marble tower is 3895."
    assert fact.asked("aware") == ("\n\nQuestion: What is the pass code of the marble tower?\n"
                                   "Answer: The pass code of the marble tower is")


@pytest.mark.parametrize("kind", facts.FORMS)
def test_facts_of_a_kind_can_be_told_apart_and_answered_in_a_word(kind):
    found = facts.drawn(kind, 32, Random(3))
    assert len({(fact.form, fact.subject) for fact in found}) == 32 and len({fact.told for fact in found}) == 32
    assert len(facts.one_of_each_form(found)) == {"codes": 1, "words": 8, "mixed": 9}[kind]
    assert sum(fact.answer.isdigit() for fact in found) == {"codes": 32, "words": 0, "mixed": 16}[kind]
    for fact in found:
        question, beginning = fact.asked("agnostic").split("\nAnswer: ")
        assert f"{beginning} {fact.answer}." == fact.told and fact.subject in question and fact.answer not in question
        assert len(fact.answer.split()) == 1


def test_words_are_planted_asked_and_scored(tokenizer, file):
    found = list(rows("agnostic", file, reader=lambda: (tokenizer, 512), facts="words", **OPTIONS))
    assert len({row["question"].split()[4] for row in found}) > 1
    for row in found:
        beginning = row["question"].split("Answer: ")[1]
        assert f"{beginning} {row['answer']}." in row["context"]
        assert len(tokenizer(row["context"] + row["question"] + f" {row['answer']}")["input_ids"]) <= 220


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
    ({"lengths": [100]}, "leave no room for text"), ({"lengths": ["many"]}, "lengths: 'many' given"),
    ({"facts": "word"}, "facts: 'word' given, one of codes, words, mixed expected .did you mean 'words'")], ids=str)
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
