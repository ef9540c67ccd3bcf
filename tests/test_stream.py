"""A streamed run writes the bytes of a run in memory, with one block's weights there at a time."""
import gc
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmopt
from llmopt import recipe
from llmopt.calibration.walk import walk
from llmopt.checkpoint import save as checkpoint
from llmopt.checkpoint.streamed import StreamedWeights
from llmopt.checkpoint.verify import VerificationError
from llmopt.errors import LlmoptError
from llmopt.files import checks, tensors
from llmopt.kv import SnapKV
from llmopt.method import Run
from llmopt.model import skeleton
from llmopt.model.blocks import blocks
from llmopt.parts import build
from llmopt.quant.making import Making
from llmopt.run import opening, pipeline
from llmopt.run.dry_run import dry_run
from llmopt.run.opening import Streaming
from llmopt.runtime import rehearsal
from llmopt.scale import stream
from llmopt.scale.memory import Memory
from llmopt.scale.stream import Streamed
from llmopt.specs import ModelSpec
from tests import tiny
from tests.plans import contents, dense, plan
from tests.test_contract import FIELDS, family_for, own_fields

STEPS = {
    "rtn": "[quant.rtn: {bits: 4, group_size: 32}]",
    "gptq": "[quant.gptq: {bits: 3, group_size: 32, clip: false}]",
    "lim": "[quant.gptq: {bits: 3, group_size: 32, allocate: lim, sweeps: 0, clip: false}]",
    "measured": "[quant.gptq: {bits: 3.5, group_size: 32, group_sizes: [16, -1], allocate: sensitivity, "
                "widths: [3, 4], sweeps: 0, plans: 1}]",
    "estimated": "[quant.rtn: {bits: 3.5, group_size: 32, allocate: hessian, widths: [3, 4]}]",
    "zd": "[quant.rtn: {bits: 3, group_size: 32, allocate: zd, overrides: {down_proj: {bits: 16}}}]",
    "local": "[prune.magnitude: {ratio: 0.3, refit: false}]",
    "global": "[prune.magnitude: {ratio: 0.3, scope: global}]",
    "widths": "[prune.wanda: {ratio: 0.3, scope: {measured: {shares: [0.5], plans: 1}}}, "
              "prune.magnitude: {units: [ffn], refit: false, scope: {ecoflap: {order: first}}}, "
              "prune.magnitude: {units: [ffn], refit: false, scope: {pagcp: {growth: 1.5}}}]",
    "blocks": "[prune.magnitude: {ratio: 0.4, units: [blocks]}, "
              "quant.gptq: {bits: 4, group_size: 32, sweeps: 0, clip: false}]",
    "parts": "[prune.magnitude: {ratio: 0.3, units: [attention, mlp]}, attention.a_shape: {sinks: 2, window: 8}]",
    "all": "[prune.magnitude: {ratio: 0.2, scope: global, units: [ffn], refit: false}, "
           "quant.gptq: {bits: 4, group_size: 16, sweeps: 0}, attention.a_shape: {sinks: 2, window: 8, min_length: 0}, "
           "kv.snapkv: {ratio: 0.5, window: 8}]",
    "heads": "[heads.span: {}, prune.magnitude: {ratio: 0.3, scope: global, units: [kv_groups], refit: false}, "
             "kv.snapkv: {ratio: 0.5, window: 8, allocate: heads, heads: heads.span}]",
    "sparse": "[prune.wanda: {ratio: 0.5, units: [weights], pattern: '2:4'}]",
    "groups": "[prune.magnitude: {ratio: 0.5, units: [kv_groups]}]",
    "kv": "[kv.streaming: {budget: 16}]",
    "nvfp4": "[quant.gptq: {scheme: NVFP4A16}]",
    "fp8": "[quant.rtn: {scheme: FP8}]",
    "tune": "[quant.tune: {bits: 3, group_size: 32, iterations: 3}]",
    "zeros": "[quant.rtn: {bits: 3, group_size: 32, symmetric: false}, kv.streaming: {budget: 16}]",
    "narrow": "[prune.fisher: {ratio: 0.3, units: [ffn]}]",
}
WIDE = ("lim", "widths", "nvfp4", "fp8", "local", "groups", "measured", "estimated", "tune", "zd", "zeros", "global",
        "sparse", "narrow")                                       # for the full tier
CASES = [*(("llama", steps, {}) for steps in STEPS if steps not in WIDE),
         ("qwen3", "all", {"tie_word_embeddings": True}), ("gpt_neox", "narrow", {}), ("gpt2", "gptq", {}),
         ("mixtral", "kv", {}), ("qwen3_moe", "gptq", {}),
         *(pytest.param(*case, marks=pytest.mark.full) for case in (
             *(("llama", steps, {}) for steps in WIDE), ("llama", "all", {"tie_word_embeddings": True}),
             ("gemma2", "heads", {}), ("phi3", "gptq", {}), ("qwen2_moe", "groups", {}), ("gpt_neox", "rtn", {}),
             ("gemma3_text", "all", {}), ("gpt2", "narrow", {}), ("opt", "narrow", {}),
             ("mixtral", "rtn", {"num_local_experts": 12}), ("qwen3_moe", "groups", {})))]


@pytest.mark.parametrize(("family", "steps", "changes"), CASES)
def test_the_bytes_are_those_of_a_run_in_memory(family, steps, changes, tmp_path):
    model = dense(tmp_path, family, **changes)
    extra = "format: dense\n" if family == "gpt2" else ""
    made = plan(tmp_path, model, STEPS[steps], extra)
    for name, force in (("memory", False), ("streamed", True)):
        report = pipeline.run(made, tmp_path / name, streaming=Streaming(force, activations=1 << 14))
        assert report.streamed == force
    one, two = contents(tmp_path / "memory"), contents(tmp_path / "streamed")
    assert one.keys() == two.keys()
    assert not [name for name in one if one[name] != two[name]]
    assert len([name for name in one if name.endswith(".safetensors")]) > 1
    assert not list(tmp_path.glob("*llmopt-work*"))


def test_a_file_may_leave_out_the_prefix_of_the_base_model(tmp_path):
    model = dense(tmp_path, "gpt2")
    tensors = {name: t for file in checks.weight_files(model) for name, t in load_file(file).items()}
    for file in model.glob("*.safetensors*"):
        file.unlink()
    save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, model / "model.safetensors",
              metadata={"format": "pt"})
    made = plan(tmp_path, model, STEPS["narrow"])
    for name, force in (("memory", False), ("streamed", True)):
        pipeline.run(made, tmp_path / name, streaming=Streaming(force))
    one, two = (checkpoint.load(tmp_path / name)[0].state_dict() for name in ("memory", "streamed"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_one_block_at_a_time(tmp_path, monkeypatch):
    """Counted whenever a quantizer looks at a weight: the weights there are those of one block and no embedding."""
    seen, model = [], skeleton.open_model(ModelSpec(id=str(dense(tmp_path, "llama", num_hidden_layers=6))))[0]
    block = sum(p.numel() for p in blocks(model)[0].module.parameters())
    solve = Making._solve

    def real():
        return sum(t.numel() for t in gc.get_objects() if type(t) is torch.nn.Parameter and not t.is_meta)

    def counted(self, projection, *rest):
        if projection.name.endswith("down_proj"):
            seen.append(real())
        return solve(self, projection, *rest)

    monkeypatch.setattr(Making, "_solve", counted)
    gc.collect()
    there = real()
    pipeline.run(plan(tmp_path, tmp_path / "dense", STEPS["gptq"]), tmp_path / "out", streaming=Streaming(True))
    assert len(seen) == 6
    assert max(seen) - there == block


def test_activations_beyond_their_room_are_mapped_from_nameless_files(tmp_path):
    memory = Streamed.__new__(Streamed)
    memory.work, memory.room = tmp_path, 3 * 3 * 800
    given = [torch.randn(10, 20, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    kept = memory.keep(iter(given))
    assert [a is b for a, b in zip(given, kept, strict=True)] == [True] * 3 + [False] * 2
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))
    assert not list(tmp_path.iterdir())
    assert "activations (deleted)" in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(("family", "unequal", "distinct"), [("llama", 3, 3), ("llama", 1, 1), ("gemma3_text", 3, 6)])
def test_masks_are_held_once_and_within_the_room_of_activations(family, unequal, distinct, tmp_path, monkeypatch):
    """Three batches: `unequal` patterns of padding, one mask for each and for each kind of layer."""
    batches, masks, filed = [], [], []
    for i in range(3):
        real = torch.ones(4, 24, dtype=torch.long)
        real[1, 20 - i % unequal:] = 0
        batches.append({"input_ids": tiny.ids(4, 24), "attention_mask": real})
    monkeypatch.setattr(stream, "spilled", lambda tensor, file: filed.append(tensor.dtype) or tensor)
    held = Streamed.__new__(Streamed)
    held.work, held.room = tmp_path, 3 * (4 * 24 * 24)                # one mask, and no more
    memory = Memory()
    memory.keeper = held.keeper
    for visit in walk(tiny.make(family), batches, memory=memory):
        masks += [kwargs["attention_mask"] for _, kwargs in visit.calls]
    assert len(masks) == 9 and len({id(mask) for mask in masks}) == distinct
    assert filed.count(torch.bool) == distinct - 1


@pytest.mark.parametrize("steps", ["heads.gradient: {}", "quant.rtn: {bits: 3.5, group_size: 32, allocate: lrp}"])
def test_steps_that_need_the_whole_model_are_refused_with_what_they_would_take(steps, tmp_path):
    made = plan(tmp_path, dense(tmp_path, "llama"), f"[{steps}]")
    with pytest.raises(LlmoptError, match=r"steps.0 .*: works on the whole model .* [1-9]\S+ [kM]B \(.* are available"):
        pipeline.run(made, tmp_path / "out", streaming=Streaming(True))
    assert not list(tmp_path.glob("*out*"))


def test_a_step_on_the_whole_model_is_refused_where_its_work_does_not_fit(tmp_path, monkeypatch):
    made = plan(tmp_path, dense(tmp_path, "llama"), "[heads.gradient: {}]")
    monkeypatch.setattr(opening, "available", lambda: 50_000_000)
    assert dry_run(made)["steps"]
    monkeypatch.setattr(opening, "available", lambda: 1_000_000)           # the weights alone take 0.4 MB
    with pytest.raises(LlmoptError, match=r"heads.gradient: works on the whole model at once; .* [1-9]\S+ MB \("):
        dry_run(made)
    assert dry_run(made, Streaming(False))["steps"]


# methods that walk the blocks as another does, for the full tier
ALIKE = ("heads.divergence", "heads.influence", "heads.lofit", "heads.need90", "heads.patching", "prune.dimap",
         "prune.flap", "prune.modhifi", "prune.nvit", "prune.obs", "prune.taylor", "prune.tyr", "quant.weights",
         "transform.fold_norms")


def streamed() -> list:
    """Every method; in the full tier alone: ALIKE, all but two of those that act at run time and learn nothing."""
    idle = [name for name in llmopt.names() if name.startswith(("attention.", "kv.")) and not own_fields(name, "BEFORE")
            and not build(name, FIELDS.get(name, {})).needs_data and name not in ("attention.a_shape", "kv.snapkv")]
    return [pytest.param(name, marks=pytest.mark.full) if name in (*idle, *ALIKE) else name for name in llmopt.names()]


@pytest.mark.parametrize("name", streamed())
def test_every_method_streams_or_says_that_it_cannot(name, tmp_path):
    steps = [{before: fields} for before, fields in own_fields(name, "BEFORE").items()]
    model = dense(tmp_path, family_for(name, "qwen3"))
    made = plan(tmp_path, model, json.dumps([*steps, {name: FIELDS.get(name, {})}]))
    if any(step.needs_whole for step in made.steps):
        return
    for folder, force in (("memory", False), ("streamed", True)):
        pipeline.run(made, tmp_path / folder, streaming=Streaming(force))
    assert contents(tmp_path / "memory") == contents(tmp_path / "streamed")


@pytest.mark.parametrize(("kv", "family"), [(None, "gemma3_text"), ("kv.streaming: {budget: 20}", "mistral"),
                                            ("kv.snapkv: {ratio: 0.5, window: 8, allocate: ada}", "qwen3"),
                                            ("kv.snapkv: {ratio: 0.4, window: 8, allocate: prefix}", "gemma3_text")])
def test_the_cache_is_measured_without_weights(kv, family):
    model = tiny.make(family)
    if kv:
        recipe.parse(f"steps: [{kv}]", "t").steps[0].apply(model, Run())
    length = min(512, model.config.max_position_embeddings // 2)
    assert rehearsal.cache_bytes(model, length) == rehearsal.cache_bytes_per_token(model) * length


@pytest.mark.parametrize(("lost", "fact"), [("experts.3", r"mlp.experts.\w+ is \[3, .*, the config wants \[4, "),
                                            ("experts.1.up_proj", "the experts do not fit together"),
                                            ("gate.weight", "1 tensors missing, such as model.layers.1.mlp.gate")])
def test_a_lost_expert_is_found_before_any_work(lost, fact, tmp_path):
    model = dense(tmp_path, "qwen3_moe")
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        kept = {name: t for name, t in tensors.items() if f"layers.1.mlp.{lost}" not in name}
        save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(LlmoptError, match=fact):
        pipeline.run(plan(tmp_path, model, STEPS["rtn"]), tmp_path / "out", streaming=Streaming(True))
    assert not list(tmp_path.glob("*out*"))


def test_experts_that_lie_in_one_tensor_stay_there(tmp_path):
    model = tiny.make("qwen3_moe")
    checkpoint.save(model, tmp_path / "dense")
    for file in (tmp_path / "dense").glob("*.safetensors"):
        save_file(model.state_dict(), file, metadata={"format": "pt"})
    made = plan(tmp_path, tmp_path / "dense", STEPS["kv"])
    for name, force in (("memory", False), ("streamed", True)):
        pipeline.run(made, tmp_path / name, streaming=Streaming(force))
    assert contents(tmp_path / "memory") == contents(tmp_path / "streamed")


@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_the_cache_of_a_scorer_that_reads_weights_is_measured_without_them(allocate):
    """It looks at keys before RoPE and at the output weight, which a skeleton does not have."""
    class Weighted(SnapKV):
        def score(self, view):
            written = torch.einsum("hde,bhwd->bhwe", view.output_weight(), view.queries).norm(dim=-1)
            return view.unrotated_keys().norm(dim=-1) * view.mean_over_group(written).mean(-1, keepdim=True)

    real = tiny.make("qwen3")
    bare = skeleton.skeleton(real.config, torch.float32)
    for model in (real, bare):
        Weighted(ratio=0.5, window=8, allocate=allocate).apply(model, Run())
    assert rehearsal.cache_bytes_per_token(bare) == rehearsal.cache_bytes_per_token(real)
    assert all(parameter.is_meta for parameter in bare.parameters())


def test_damage_is_found_when_a_block_is_read_and_leaves_nothing(tmp_path):
    model = dense(tmp_path, "llama")
    file = sorted(model.glob("*.safetensors"))[2]
    tensors = load_file(file)
    next(t for name, t in tensors.items() if name.endswith("up_proj.weight"))[0, 3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LlmoptError, match="up_proj.weight holds 1 NaN"):
        pipeline.run(plan(tmp_path, model, STEPS["rtn"]), tmp_path / "out", streaming=Streaming(True))
    assert not list(tmp_path.glob("*out*"))


def test_what_reads_back_otherwise_is_no_success(tmp_path, monkeypatch):
    write = StreamedWeights.write

    def damaged(self, stage, max_shard_size):
        write(self, stage, max_shard_size)
        file = sorted(stage.glob("*.safetensors"))[-2]
        data = bytearray(file.read_bytes())
        data[-9] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(StreamedWeights, "write", damaged)
    with pytest.raises(VerificationError, match="does not read back as it was written"):
        pipeline.run(plan(tmp_path, dense(tmp_path, "llama"), STEPS["rtn"]), tmp_path / "out",
                     streaming=Streaming(True))
    assert [path.name for path in tmp_path.glob("*out*")] == ["out.llmopt-work"]      # --resume writes it again


def test_it_starts_by_itself_when_the_model_does_not_fit(tmp_path, monkeypatch):
    made = plan(tmp_path, dense(tmp_path, "llama"), STEPS["rtn"])
    size = tensors.dense_bytes(tmp_path / "dense")
    assert size == sum(t.numel() * 4 for f in checks.weight_files(tmp_path / "dense") for t in load_file(f).values())
    for free, streamed in ((size, False), (size - 1, True)):
        monkeypatch.setattr(opening, "available", lambda free=free: free)
        assert Streaming().wanted(made.model) == streamed
        assert not Streaming(force=False).wanted(made.model)


def test_a_dry_run_says_the_same(tmp_path):
    made = plan(tmp_path, dense(tmp_path, "qwen3"), STEPS["all"])
    told = [dry_run(made, Streaming(streamed)) for streamed in (True, False)]
    assert [plan["streamed"] for plan in told] == [True, False]
    assert len({str([plan[key] for key in ("steps", "predicted_bytes", "dense_bytes")]) for plan in told}) == 1
