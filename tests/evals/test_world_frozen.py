"""world-v1 is frozen: published figures refer to these weights and these texts, so neither may change."""

import json
from hashlib import sha256

from llmopt_evals.world import calibration_ids, reference_path
from llmopt_evals.world.questions import copy_questions, fact_questions, recall_questions
from llmopt_evals.world.text import eval_stories, perplexity_text

WORLD_V1 = {
    "weights": "8bd19f2cb2d244c7",
    "weights with experts": "3ee5be1b80e3844b",
    "tokenizer": "14487e756c17ba26",
    "questions": "c31289bad30985ff",
    "texts": "017dd8d646b30873",
}


def digest(data) -> str:
    return sha256(data if isinstance(data, bytes) else json.dumps(data).encode()).hexdigest()[:16]


def test_world_v1_is_what_it_was():
    recall = [recall_questions(count, form) for count in (40, 160) for form in ("aware", "agnostic")]
    asked = [vars(q) for group in (*recall, fact_questions(), copy_questions(100)) for q in group]
    read = [perplexity_text(24, 512), [s.ids for s in eval_stories(4, 512)], calibration_ids(8, 512).tolist()]
    assert {
        "weights": digest((reference_path() / "model.safetensors").read_bytes()),
        "weights with experts": digest((reference_path("llmopt/reference-moe") / "model.safetensors").read_bytes()),
        "tokenizer": digest((reference_path() / "tokenizer.json").read_bytes()),
        "questions": digest(asked),
        "texts": digest(read),
    } == WORLD_V1
