"""What happens inside a forward: how much is held at most, which queries and positions are kept, buffers of methods."""
import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from llmopt_kernels import rotate
from pydantic.dataclasses import dataclass

import llmopt
from llmopt import kv, runtime
from llmopt.errors import LlmoptError
from llmopt.method import Record, Run
from llmopt.model.positions import attention_windows
from llmopt.parts import _REGISTRY, register
from llmopt.runtime import hooks
from tests import warm
from tests.command import command
from tests.tiny import ids, make

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text", "olmo2", "gpt_neox", "gpt2", "opt",
            "mixtral"]
LAYER = 2 * 2 * 2 * 16 * 4              # bytes that a token of two rows takes in one layer of the tiny Llama


@pytest.fixture
def watched(monkeypatch):
    """A list that grows by the cache's bytes whenever a layer computes its attention."""
    held = []

    def watch(name):
        plain = getattr(hooks, name)

        def measured(query, *args):
            held.append(watch.cache().nbytes())
            return plain(query, *args)
        monkeypatch.setattr(hooks, name, measured)

    watch("dense_attention")
    watch("ragged_attention")
    watch("lanes_attention")
    held_by = lambda model: setattr(watch, "cache", lambda: runtime.attachment(model).now.cache)  # noqa: E731
    return held, held_by


def padded(length=160, pads=30):
    tokens = ids(2, length)
    mask = torch.ones_like(tokens)
    mask[1, :pads] = 0
    return tokens, mask


@pytest.mark.parametrize("allocate", ["uniform", "ada", "pyramid", "heads", "global", "prefix"])
@pytest.mark.parametrize("chunks", [[160], [100, 1, 59]])
def test_a_prefill_holds_one_full_layer_at_most(allocate, chunks, watched):
    held, watch = watched
    model, (tokens, mask) = make("llama", num_hidden_layers=6), padded()
    given = dict(heads="s") if allocate == "heads" else {}
    run = Run(scores={"s": [torch.rand(4) for _ in range(6)]})
    with runtime.attached(model, kv.SnapKV(budget=16, window=8, allocate=allocate, **given), run=run):
        watch(model)
        cache, start = None, 0
        for size in chunks:
            part = slice(start, start + size)
            cache = model(tokens[:, part], attention_mask=mask[:, :part.stop], past_key_values=cache,
                          use_cache=True).past_key_values
            start += size
    queries = 2 * 8 * (4 * 16 * 4 + 8)                                   # 8 of them with their positions
    bound = cache.nbytes() + max(chunks) * LAYER + queries + 2 * 160     # and the padding mask
    assert (max(held) <= bound) == (allocate not in ("global", "prefix"))
    assert len(held) == 6 * len(chunks)


def test_decoding_and_frozen_forwards_hold_what_they_must(watched):
    held, watch = watched
    model, (tokens, _) = make("llama"), padded()
    with runtime.attached(model, kv.Streaming(budget=16, every=4)):
        watch(model)
        cache = model(tokens[:, :100], use_cache=True).past_key_values
        held.clear()
        for i in range(100, 108):
            cache = model(tokens[:, i:i + 1], past_key_values=cache).past_key_values
        small = 3 * (2 * 2 * 16 * (2 * 16 * 4 + 4) + 2 * 2 * 8)          # kept entries, positions, counts
        assert cache.nbytes() == small and max(held) <= small + 3 * 4 * LAYER
        with runtime.frozen(model):
            cache = model(tokens[:, 108:], past_key_values=cache).past_key_values
        assert cache.nbytes() == small + 3 * 52 * LAYER


def test_sliding_layers_let_go_right_after_their_attention(watched):
    held, watch = watched
    model, tokens = make("mistral", sliding_window=12), padded()[0]
    with runtime.attached(model, kv.SnapKV(budget=100, allocate="global")):
        watch(model)
        cache = model(tokens, use_cache=True).past_key_values
    assert max(held) <= 160 * LAYER + 2 * 12 * LAYER + 3 * 2 * 32 * (4 * 16 * 4 + 8)
    assert max(int(c.max()) for c in cache.kept()) == 12        # the last query can be asked again


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_are_those_the_attention_is_called_with(family):
    model = make(family, **({"sliding_window": 12} if family in ("mistral", "mixtral", "phi3") else {}))
    with runtime.attached(model, kv.Streaming(budget=20)):
        model(ids(1, 30), use_cache=True)
        rules = runtime.attachment(model).rules
        assert attention_windows(model) == [rules[i].window for i in range(3)]


# ------------------------------------------------------------------------------------------------- recorded queries

@pytest.mark.parametrize("every, window, want", [(2, 4, 4), (6, 4, 4), (3, 4, 4)])
def test_queries_are_the_last_ones_also_across_compressions(every, window, want, monkeypatch):
    """At every compression SnapKV sees its whole window of queries, never more, and each at its own position."""
    model, (tokens, mask) = make("llama"), padded(60, 20)
    seen = []
    monkeypatch.setattr(kv.SnapKV, "score", lambda self, view: (seen.append(
        (view.layer, view.query_positions[0].tolist(), view.lengths.tolist()[0])), view.positions.float())[1])
    with runtime.attached(model, kv.SnapKV(budget=10, window=window, every=every)):
        cache = model(tokens[:, :45], attention_mask=mask[:, :45], use_cache=True).past_key_values
        for i in range(45, 60):
            cache = model(tokens[:, i:i + 1], attention_mask=mask[:, :i + 1], past_key_values=cache).past_key_values
            assert all(x.queries is None or x.queries.shape[2] <= want for x in cache.layers)
    assert len(seen) == 2 * 3 * (1 + 15 // every)
    assert all(positions == list(range(length - want, length)) for _, positions, length in seen)


def test_every_equals_compressing_by_hand():
    """Decoding with `every` leaves the entries that the same scores, computed from a dense run, would leave."""
    model, tokens = make("llama"), ids(1, 60)
    method = kv.SnapKV(budget=20, window=6, pool=1, every=5)
    with runtime.attached(model, method):
        cache = model(tokens[:, :50], use_cache=True).past_key_values
        for i in range(50, 55):
            before = [layer.fork() for layer in cache.layers]
            cache = model(tokens[:, i:i + 1], past_key_values=cache).past_key_values
    first, after = before[0], cache.layers[0]
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens[:, :55]))
    query = model.model.layers[0].self_attn.q_proj(hidden).view(1, 55, 4, 16).transpose(1, 2)
    cos, sin = model.model.rotary_emb(hidden, torch.arange(55)[None])
    query = rotate(query, cos[:, None], sin[:, None])[0, :, 49:]
    for head, (_, _, where) in enumerate(after.kept.heads()):
        positions = torch.cat([first.kept.positions[list(first.kept.heads())[head][2]], torch.arange(50, 55)])
        fresh = model.model.layers[0].self_attn.k_proj(hidden).view(1, 55, 2, 16).transpose(1, 2)
        keys = rotate(fresh, cos[:, None], sin[:, None])[0, head, positions]
        logits = query[2 * head:2 * head + 2] @ keys.T / 4
        visible = positions <= torch.arange(49, 55)[:, None]
        votes = logits.masked_fill(~visible, -torch.inf).softmax(-1).mean((0, 1))
        votes[positions >= 49] = torch.inf
        assert after.kept.positions[where].tolist() == positions[votes.topk(20).indices.sort().values].tolist()



# ------------------------------------------------------------------------------------------------- tensors of methods

@dataclass(frozen=True)
class Listed(kv.Streaming):
    """Keeps what a stored curve says: a scorer with a tensor."""

    def plan(self, model, run):
        curve = torch.rand(3, 256, generator=torch.Generator().manual_seed(run.seed)) + 1e-6    # fp32 in a bf16 model
        return Record({"seed": run.seed}, {"curve": curve, "parts.size": torch.tensor([256])})

    def score(self, view):
        size = int(view.record.tensors["parts.size"])
        return view.record.tensors["curve"][view.layer, :size][view.positions.clamp(min=0)]


@pytest.fixture
def listed():
    register("kv.listed")(Listed)
    yield Listed(budget=12, sinks=0)
    del _REGISTRY["method"]["kv.listed"]


def kept(model, tokens):
    cache = model(tokens, use_cache=True).past_key_values
    return torch.cat([layer.kept.positions for layer in cache.layers])


LOADER = """
import sys
sys.modules["llmopt"] = None                # as on a machine without llmopt
import torch
from transformers import AutoModelForCausalLM
for trust in (False, True):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", trust_remote_code=trust)
    print("llmopt.1.curve" in model.state_dict())
    torch.save(model(torch.load(sys.argv[2])).logits, f"{sys.argv[2]}.{trust}")
"""


def test_tensors_of_a_method_travel_with_the_checkpoint(listed, tmp_path):
    model, tokens = make("llama", torch.bfloat16), ids(2, 40)
    dense = model(tokens).logits
    llmopt.compress(model, [attention := llmopt.attention.AShape(min_length=0), listed], seed=5)
    want, curve = kept(model, tokens), model.get_buffer("llmopt.1.curve")
    folder = llmopt.save(model, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())["llmopt"]
    assert config["tensors"] == {"1.curve": {"shape": [3, 256], "dtype": "float32"},
                                 "1.parts.size": {"shape": [1], "dtype": "int64"}}
    assert config["steps"][1]["meta"] == {"seed": 5} and config["steps"][0]["method"] == attention.to_dict()
    for trust in (False, True):
        fresh = llmopt.load(folder)[0] if not trust else trusted(folder)
        assert torch.equal(fresh.get_buffer("llmopt.1.curve"), curve) and curve.dtype == torch.float32
        assert torch.equal(kept(fresh, tokens), want)
        assert runtime.runtime_config(fresh) == runtime.runtime_config(model)
    again = llmopt.save(copy.deepcopy(fresh), tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    runtime.detach(fresh)
    assert not any(name.startswith("llmopt") for name in fresh.state_dict())
    torch.save(tokens, tmp_path / "io.pt")
    done = warm.run("-c", LOADER, folder, tmp_path / "io.pt", env=command()[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "True"] and "llmopt is not installed" in done.stderr
    for trust in (False, True):
        assert torch.equal(torch.load(tmp_path / f"io.pt.{trust}"), dense)


def trusted(folder: Path):
    """The folder through the code file that it carries, llmopt being there."""
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    name = AutoConfig.from_pretrained(folder).auto_map["AutoModelForCausalLM"]
    return get_class_from_dynamic_module(name, folder).from_pretrained(folder, dtype="auto")


def test_tensors_go_when_their_method_goes(listed):
    model, tokens = make("llama"), ids(1, 40)
    names = sorted(model.state_dict())
    runtime.attach(model, llmopt.attention.AShape())
    with runtime.attached(model, listed):
        assert "llmopt.1.curve" in model.state_dict()
        with pytest.raises(LlmoptError, match="attached already"):
            listed.apply(model, Run())
        first = kept(copy.deepcopy(model), tokens)
        assert torch.equal(first, kept(model, tokens))
    assert sorted(model.state_dict()) == names and runtime.runtime_config(model).keys() == {"steps"}


def test_a_model_without_its_tensors_is_refused(listed):
    model, other = make("llama"), make("llama")
    listed.apply(model, Run())
    other.config.llmopt = runtime.runtime_config(model)
    with pytest.raises(LlmoptError, match="tensor llmopt.0.curve is missing"):
        runtime.attach_from_config(other)


# ------------------------------------------------------------------------------------------------- position ids

@pytest.mark.parametrize("shift", [0, 7])
def test_position_ids_are_kept_where_they_are_not_the_columns(shift):
    model, (tokens, mask) = make("llama"), padded(40, 9)
    places = (mask.cumsum(-1) - 1).clamp(min=0) + shift
    with runtime.attached(model, kv.SnapKV(budget=100)):
        cache = model(tokens[:, :30], attention_mask=mask[:, :30], position_ids=places[:, :30],
                      use_cache=True).past_key_values
        model(tokens[:, 30:], attention_mask=mask, position_ids=places[:, 30:], past_key_values=cache)
        assert torch.equal(cache.position_ids, places)
        cache.batch_select_indices(torch.tensor([1]))
        assert torch.equal(cache.fork().position_ids, places[1:])
        plain = model(tokens, use_cache=True).past_key_values
    assert plain.position_ids is None
    assert plain.nbytes() == plain.dense_nbytes() + 3 * 2 * 32 * (4 * 16 * 4 + 8)      # 32 queries wait for their turn


# ------------------------------------------------------------------------------------------- threads, other decoders

def test_threads_on_one_model_do_not_mix():
    model, rows = make("llama"), [ids(1, 40 + 8 * i, seed=i) for i in range(4)]
    start = threading.Barrier(len(rows))

    def text(row, wait=False):
        return [model.generate(row, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
                for _ in range(3) if not wait or start.wait(10) is not None]

    with runtime.attached(model, kv.SnapKV(ratio=0.5, window=4)), ThreadPoolExecutor(len(rows)) as pool:
        alone = [text(row) for row in rows]
        together = list(pool.map(lambda row: text(row, wait=True), rows))
    for mine, theirs in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("how", ["prompt_lookup_num_tokens", "assistant_model"])
def test_decoding_that_takes_tokens_back_is_refused_by_name(how):
    model = make("llama")
    given = {how: 2 if how == "prompt_lookup_num_tokens" else make("llama", seed=3)}
    with runtime.attached(model, kv.SnapKV(ratio=0.5, window=4)), pytest.raises(LlmoptError, match="assisted decoding"):
        model.generate(ids(1, 40), max_new_tokens=8, do_sample=False, pad_token_id=0, **given)
