"""The classes behind AutoModel: stock for stock configs, exact for per-layer shapes, refused by stock transformers."""
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXForCausalLM, LlamaForCausalLM

from llmopt.checkpoint.save import load
from llmopt.method import Run
from llmopt.model import modeling
from llmopt.model.blocks import attention_modules
from llmopt.model.modeling import FAMILIES, SkippedAttn, remote_files, saved_config
from llmopt.prune.surgery import LayerPlan, apply_plan
from tests import tiny, warm
from tests.command import ROOT, command

HEADS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text")
SHAPED = (*HEADS, "olmo2", "gpt_neox", "gpt2", "opt")
IDS = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(1))       # as in load_many.py
TRUSTED_FIRST = """
import sys
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
import llmopt
from llmopt.model.blocks import blocks

assert type(model).__module__.startswith("transformers_modules")
ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(1))
with llmopt.attached(model, llmopt.kv.SnapKV(budget=8, window=4)):
    model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
kept = [(b.attention is not None, b.ffn_out is not None) for b in blocks(model)]
llmopt.compress(model, [llmopt.heads.Span(), llmopt.prune.Magnitude(ratio=0.3, units=["ffn"], refit=False),
    llmopt.quant.RTN(bits=4, group_size=-1), llmopt.kv.SnapKV(ratio=0.5, window=4)], batches=ids)
llmopt.save(model, sys.argv[2])
torch.save({"kept": kept, "logits": model(ids).logits}, sys.argv[3])
"""


def pick(total, *gone):
    return torch.tensor([i for i in range(total) if i not in gone])


def plans():
    """name -> (family, plan): different widths and heads, a skipped part alone (the silent case), uniform shapes."""
    cases = {}
    for family in SHAPED:
        first = LayerPlan(ffn=pick(96, 0, 7), kv_groups=pick(4, 2) if family in HEADS and family != "phi3" else None)
        cases[f"layers-{family}"] = (family, [first, LayerPlan(), LayerPlan(ffn=pick(96, 1))])
        cases[f"skip_attention-{family}"] = (family, [LayerPlan(skip=("attention",)), LayerPlan(), LayerPlan()])
        if family != "opt":
            cases[f"skip_mlp-{family}"] = (family, [LayerPlan(), LayerPlan(skip=("mlp",)), LayerPlan()])
        if family in ("llama", "phi3", "gpt2", "opt"):       # one of each name for the width
            cases[f"uniform-{family}"] = (family, [LayerPlan(ffn=pick(96, i)) for i in range(3)])
    for family in HEADS:
        cases[f"six_of_eight-{family}"] = (family, [LayerPlan(kv_groups=pick(4, i)) for i in range(3)])
    for family in ("llama", "gemma3_text"):     # head counts that the config class refuses, beside a skipped part
        cases[f"six_of_eight_skip-{family}"] = (
            family, [LayerPlan(kv_groups=pick(4, i), skip=("mlp",) if i else ()) for i in range(3)])
    return cases


def needs_code(name):
    return not name.startswith("uniform") and name not in {
        f"six_of_eight-{f}" for f in ("llama", "mistral", "qwen2", "qwen3", "phi3")}


def pruned(family, plan):
    changes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8} if family in HEADS else {}
    model = tiny.make(family, **changes)
    apply_plan(model, plan, Run())
    return model


def write(model, folder):
    folder.mkdir()
    tied = set(model.all_tied_weights_keys)
    save_file({k: v.contiguous() for k, v in model.state_dict().items() if k not in tied},
              folder / "model.safetensors", metadata={"format": "pt"})
    config, code = saved_config(model)
    if code:
        files, config["auto_map"] = remote_files(model)
        for name, text in files.items():
            (folder / name).write_text(text)
    (folder / "config.json").write_text(json.dumps(config))
    return code


def behaviour(model):
    with torch.no_grad():
        return model(IDS).logits, model.generate(IDS, max_new_tokens=32, do_sample=False, pad_token_id=0,
                                                 eos_token_id=None)


def python(*words):
    """A process of its own, warm but without llmopt."""
    done = warm.run(*words, env=command()[1])
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """folder and in-memory behaviour of every case, and what strangers make of the folders."""
    root, memory, code = tmp_path_factory.mktemp("made"), {}, {}
    for name, (family, plan) in plans().items():
        model = pruned(family, plan)
        code[name] = write(model, root / name)
        memory[name] = behaviour(model)
    python(ROOT / "tests/load_many.py", "plain,trust", root / "seen.pt", *(root / name for name in memory))
    seen = {how: {Path(k).name: v for k, v in found.items()} for how, found in torch.load(root / "seen.pt").items()}
    return root, memory, code, seen


@pytest.mark.parametrize("name", plans())
def test_stock_transformers_loads_it_exactly_or_refuses_it(made, name):
    _, memory, code, seen = made
    assert code[name] == needs_code(name)
    plain = seen["plain"][name]
    if code[name]:
        assert "Ambiguous" in plain.get("error", "") or "size" in plain.get("error", ""), plain
    else:
        assert torch.equal(plain["logits"], memory[name][0])
        assert torch.equal(plain["tokens"], memory[name][1])


@pytest.mark.parametrize("name", plans())
def test_trusting_the_remote_file_loads_it_exactly_without_llmopt(made, name):
    _, memory, _, seen = made
    assert "error" not in seen["trust"][name], seen["trust"][name]
    assert torch.equal(seen["trust"][name]["logits"], memory[name][0])
    assert torch.equal(seen["trust"][name]["tokens"], memory[name][1])


@pytest.mark.parametrize("name", plans())
def test_registered_it_loads_exactly_and_again_after_save_pretrained(made, name, tmp_path):
    root, memory, _, _ = made
    model, info = AutoModelForCausalLM.from_pretrained(root / name, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():       # generated text: the same classes wrote it in the test above
        assert torch.equal(model.eval()(IDS).logits, memory[name][0])
        assert torch.equal(again.eval()(IDS).logits, memory[name][0])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ordinary_config_gives_the_stock_model(family, tmp_path):
    ours = tiny.make(family)
    stock = type(ours).__bases__[1]
    assert type(ours).__name__ == stock.__name__ and stock.__module__.startswith("transformers.")
    ours.save_pretrained(tmp_path)
    theirs = stock.from_pretrained(tmp_path).eval()
    assert theirs.config.architectures == [stock.__name__]
    assert set(theirs.state_dict()) == set(ours.state_dict())
    assert torch.equal(theirs(tiny.ids()).logits, ours(tiny.ids()).logits)


def test_attention_implementations_reach_every_layer(made):
    model = AutoModelForCausalLM.from_pretrained(made[0] / "layers-llama").eval()
    before = model(tiny.ids()).logits
    model.set_attn_implementation("eager")
    assert [m.config._attn_implementation for m in attention_modules(model)] == ["eager"] * 3
    assert all(m.config is model.config for m in attention_modules(model))
    torch.testing.assert_close(model(tiny.ids()).logits, before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text"])
def test_a_skipped_first_attention_still_counts_tokens(made, family):
    model = AutoModelForCausalLM.from_pretrained(made[0] / f"skip_attention-{family}").eval()
    assert isinstance(next(m for m in model.modules() if isinstance(m, SkippedAttn)), SkippedAttn)
    ids = tiny.ids(2, 30)
    with torch.no_grad():
        first = model(ids[:, :20], use_cache=True)
        assert first.past_key_values.get_seq_length() == 20
        rest = model(ids[:, 20:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(rest, model(ids).logits[:, 20:], atol=1e-4, rtol=0)


def test_a_trusted_model_can_be_compressed_again_once_llmopt_is_imported(tmp_path):
    model = pruned("llama", [LayerPlan(skip=("attention",)), LayerPlan(skip=("mlp",)), LayerPlan()])
    write(model, tmp_path / "m")
    python("-c", TRUSTED_FIRST, *(tmp_path / name for name in ("m", "out", "seen.pt")))
    seen = torch.load(tmp_path / "seen.pt")
    assert seen["kept"] == [(False, True), (True, False), (True, True)]
    assert torch.equal(load(tmp_path / "out")[0](IDS).logits, seen["logits"])


def test_a_stock_folder_whose_files_name_the_head_otherwise_is_read(tmp_path):
    """GPT-NeoX and Pythia: embed_out in the files, lm_head in the model."""
    stock = GPTNeoXForCausalLM(tiny.CONFIGS["gpt_neox"])
    stock.save_pretrained(tmp_path)
    assert "embed_out.weight" in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is not GPTNeoXForCausalLM
    assert torch.equal(loaded(IDS).logits, stock.eval()(IDS).logits)


def test_building_one_leaves_the_stock_classes_alone(made):
    layer = modeling._stock(FAMILIES["llama"], "LlamaDecoderLayer")
    before = layer.__init__
    for cls in (AutoModelForCausalLM, LlamaForCausalLM):
        cls.from_pretrained(made[0] / "layers-llama")
        assert layer.__init__ is before


def test_biased_llama_with_odd_heads_is_written_layer_by_layer(tmp_path):
    model = tiny.make("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8, attention_bias=True)
    apply_plan(model, [LayerPlan(kv_groups=pick(4, 1))] * 3, Run())
    assert write(model, tmp_path / "m")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert fresh.config.model_type == "llama"
    assert torch.equal(behaviour(fresh)[0], behaviour(model)[0])


def test_without_llmopt_runtime_parts_are_announced(tmp_path, monkeypatch):
    model = tiny.make("llama")
    write(model, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["llmopt"] = {"steps": [], "tensors": {"0.x": {"shape": [3], "dtype": "float32"}}}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    monkeypatch.setattr(modeling.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="llmopt is not installed"):
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert fresh.get_buffer("llmopt.0.x").shape == (3,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "m"))


def test_the_remote_file_needs_only_torch_and_transformers():
    from transformers.dynamic_module_utils import get_imports

    assert set(get_imports(modeling.__file__)) <= set(sys.stdlib_module_names) | {"torch", "transformers"}
