"""The table of architectures in llmopt/model/README.md is what the code says, cell by cell."""
import pytest

from llmopt.model.architectures import REFUSED, SPECS
from tests import table, tiny

# those that issue 16 names
NAMED = """llama mistral ministral3 qwen2 qwen3 qwen3_5_text phi phi3 gemma gemma2 gemma3_text gemma4_text olmo olmo2
    olmo3 smollm3 granite cohere2 glm4 exaone4 starcoder2 stablelm ernie4_5 hunyuan_v1_dense seed_oss nemotron arcee
    apertus helium nanochat bitnet gpt2 gptj gpt_neox gpt_bigcode opt bloom falcon mpt codegen
    mixtral qwen2_moe qwen3_moe qwen3_next qwen3_5_moe_text gpt_oss olmoe phimoe granitemoe minimax_m2 ernie4_5_moe
    dots1 glm4_moe deepseek_v2 deepseek_v3 llama4_text flex_olmo
    lfm2 granitemoehybrid bamba falcon_h1 nemotron_h olmo_hybrid"""
WEIGHTS = {"gptj", "bloom", "falcon", "mpt", "codegen",         # attention of their own
           "deepseek_v2", "deepseek_v3", "llama4_text"}         # latent caches, chunks


@pytest.fixture(scope="module")
def answers():
    return table.answers()


def test_the_table_is_what_the_code_says(answers):
    found = {(kind, part): why for kind, (_, works) in answers.items() for part, why in works.items()}
    assert table.read() == found and {kind for kind, _ in found} == {*SPECS, *tiny.MORE}
    assert table.TABLE.search(table.README.read_text()).group() == table.made(), "python -m tests.table --write"


def test_every_model_that_was_asked_for_is_there_at_its_level(answers):
    named = {*NAMED.split()}
    assert len(named) == 63 and named - answers.keys() == {"bitnet"} <= REFUSED.keys()
    levels = {kind: answers[kind][0] for kind in named - REFUSED.keys()}
    assert {kind for kind, level in levels.items() if level == "weights"} == WEIGHTS
    running = [kind for kind, level in levels.items() if level != "weights"]
    assert len(levels) >= 60 and len(running) >= 40
    assert sum(level == "structure" for level in levels.values()) >= 25
