"""The generator: deterministic, splits apart, entropy exact, questions answerable."""

from collections import Counter
from math import log

import pytest
from llmopt_evals.world import calibration_ids, calibration_text, split_context
from llmopt_evals.world.curriculum import Place, batch
from llmopt_evals.world.documents import FACT, RECALL, SPAN, copy_row, facts_row, recall_row, story_row
from llmopt_evals.world.questions import copy_questions, fact_questions, recall_questions
from llmopt_evals.world.seeds import SPLITS, generator
from llmopt_evals.world.stories import ADJECTIVES, THE, choice, ranked, write_story
from llmopt_evals.world.text import mixed_row
from llmopt_evals.world.tokenizer import build_tokenizer
from llmopt_evals.world.words import ASK, BOS, HAS, ID, NAME_IDS, RELATION_IDS, STOP, VALUE_IDS, WORDS, fact_value


def test_vocabulary_has_512_distinct_words_and_8192_facts():
    assert len(WORDS) == len(set(WORDS)) == 512
    assert len(fact_questions()) == len(NAME_IDS) * len(RELATION_IDS) == 8192
    assert set(Counter(q.answer for q in fact_questions())) == {(value,) for value in VALUE_IDS}


def test_facts_are_what_the_committed_weights_learned():
    table = [fact_value(name, relation) - VALUE_IDS[0] for name in NAME_IDS[:2] for relation in RELATION_IDS[:4]]
    assert table == [120, 69, 49, 62, 6, 125, 90, 88]


def test_same_seed_same_text_other_seed_other_text():
    assert calibration_ids(6, 100, seed=3).equal(calibration_ids(6, 100, seed=3))
    assert not calibration_ids(6, 100, seed=3).equal(calibration_ids(6, 100, seed=4))
    assert recall_questions(40, "aware", 2, 4) == recall_questions(40, "aware", 2, 4)


@pytest.mark.parametrize("length", [2, 15, 16, 17, 64, 1024, 1500])
def test_calibration_rows_are_whole_and_start_with_bos(length):
    ids = calibration_ids(10, length)
    assert ids.shape == (10, length)
    assert (ids[:, 0] == BOS).all() and (ids[:, 1:] > BOS).all()


def test_calibration_text_is_the_same_rows():
    assert build_tokenizer()(calibration_text(3, 50)[1])["input_ids"] == calibration_ids(3, 50)[1].tolist()


def test_splits_cannot_share_a_state_and_share_no_rows():
    tags = [(split, "mixed", seed, index) for split in SPLITS for seed in (0, 1) for index in (0, 1)]
    assert len({generator(*tag).getstate() for tag in tags}) == len(tags)
    rows = {split: {tuple(mixed_row(split, 0, i, 64).ids) for i in range(200)} for split in SPLITS}
    assert not rows["train"] & rows["eval"] and not rows["calibration"] & rows["eval"]
    with pytest.raises(ValueError, match="expected one of train, calibration, eval"):
        generator("test", 0)


def test_training_contexts_never_hold_an_evaluation_context():
    asked = {q.context[1:9] for q in recall_questions(40, "agnostic", 16, 1)}
    seen = set()
    for step in range(10):
        for row in batch(Place(stage=3), seed=0, step=step, tokens=4096):
            seen |= {tuple(row.ids[i : i + 8]) for i in range(len(row.ids) - 8)}
    assert len(asked) == 16 and not asked & seen


def test_entropy_of_one_choice_by_hand():
    assert choice("opener", BOS).entropy == pytest.approx(-(0.6 * log(0.6) + 0.25 * log(0.25) + 0.15 * log(0.15)))
    first, second = (p for _, p in ranked("place", ID["runs"])[:2])
    assert first / second == pytest.approx(2**1.3)


def parse(ids: list[int]) -> list[float]:
    """Log-probability of each token from the words before it alone, written apart from the generator."""
    found, last, slot = [], BOS, "opener"
    for index, token in enumerate(ids):
        forced = slot in ("the", "the place", "stop")
        given = {"opener": BOS, "subject": last, "place": ids[index - 3]}.get(slot, ids[index - 1])
        found.append(0.0 if forced else log(choice(slot, given).probability[token]))
        if slot in ("turn", "stop") and token == STOP:
            last, slot = ids[index - 1], "opener"
        elif slot == "opener":
            slot = "subject" if token == THE else "the"
        elif slot == "subject":
            slot = "actor" if token in ADJECTIVES else "verb"
        else:
            order = {"the": "subject", "actor": "verb", "verb": "turn", "turn": "the place", "the place": "place"}
            slot = order.get(slot, "stop")
    return found


def test_log_probabilities_follow_from_the_prefix():
    story = write_story(generator("eval", "parse"), 500)
    assert parse(story.ids) == pytest.approx(story.logp)


def test_entropy_is_the_mean_of_the_log_probabilities():
    story = write_story(generator("eval", "long"), 60_000)
    assert -sum(story.logp) / 60_000 == pytest.approx(sum(story.entropy) / 60_000, rel=0.01)


def test_every_distribution_sums_to_one():
    for given in range(0, 512, 37):
        for slot in ("opener", "subject", "actor", "verb", "turn", "place"):
            assert sum(choice(slot, given).probability.values()) == pytest.approx(1)


@pytest.mark.parametrize("form", ["aware", "agnostic"])
def test_answers_stand_in_the_context_at_the_recorded_distance(form):
    for q in recall_questions(40, form, documents=3):
        ids = q.context + q.asked + q.answer
        assert ids[len(ids) - 1 - q.distance] == q.answer[0]
        assert q.context.count(q.asked[1]) >= 1 and ids[len(ids) - 3 - q.distance] == q.asked[1]


def test_distances_are_spread():
    distances = sorted(q.distance for q in recall_questions(160, "aware", documents=4))
    assert distances[0] < 150 and distances[-1] > 600


def test_context_ends_before_the_first_ask():
    assert split_context([BOS, 9, ASK, 8, ASK, 7]) == ([BOS, 9], [ASK, 8, ASK, 7])
    assert split_context([BOS, 9]) == ([BOS, 9], [])
    assert split_context([BOS, 9, ASK, 8], build_tokenizer()) == ([BOS, 9], [ASK, 8])


def test_agnostic_questions_are_outside_the_context_and_aware_ones_inside():
    agnostic, aware = recall_questions(40, "agnostic", 1)[0], recall_questions(40, "aware", 1)[0]
    assert split_context(agnostic.context + agnostic.asked) == (list(agnostic.context), list(agnostic.asked))
    assert split_context(aware.context + aware.asked)[1] == []
    assert agnostic.context == aware.context


@pytest.mark.parametrize("strewn", [False, True])
def test_questions_follow_their_statement(strewn):
    row = recall_row(generator("train", 5), 400, 50, strewn)
    for index in (i for i, kind in enumerate(row.kinds) if kind == RECALL):
        key, has, value = row.ids[index - 2 : index + 1]
        assert has == HAS
        assert [key, HAS, value] in [row.ids[i : i + 3] for i in range(index - 4)]


def test_kinds_mark_what_can_be_known():
    facts = facts_row(generator("train", 6), 100)
    for index in (i for i, kind in enumerate(facts.kinds) if kind == FACT):
        assert facts.ids[index] == fact_value(*facts.ids[index - 2 : index])
    copies = copy_row(generator("train", 7), 200)
    start = copies.ids.index(ID["again"]) + 1
    assert copies.kinds[start] == SPAN and copies.ids[start] == copies.ids[2]
    assert len(story_row(generator("train", 8), 77).ids) == 77


def test_copy_questions_repeat_their_span_behind_other_copies():
    q = copy_questions(1)[0]
    start = len(q.context) - 17
    assert q.context[start:-1] == q.asked + q.answer and len(q.answer) == 14
    assert start == 2 + 6 * 35 and q.context[1] == q.context[start - 1] == ID["copy"]
    assert q.context[2:18] == q.context[19:35] != q.context[start:-1]
