"""A streamed run writes the bytes of a run in memory, with one block's weights there at a time."""
from pathlib import Path

import pytest

from llmopt import checkpoint, pipeline, recipe
from llmopt.stream import Streaming
from tests import tiny

DATA = "data: {name: ids, path: %s, batch_size: 3}\n"
TIMES = {"llmopt.log"}


def dense(folder: Path, family: str, **changes) -> Path:
    """A sharded dense checkpoint of a tiny model."""
    model = tiny.make(family, **changes)
    return checkpoint.save(model, folder / "dense", max_shard_size="60KB")


def plan(folder: Path, model: Path, steps: str, extra: str = "") -> recipe.Recipe:
    rows = tiny.ids(8, 24).tolist()
    rows[3] = rows[3][:17]                                # padding in the second batch
    (folder / "ids.jsonl").write_text("\n".join(map(str, rows)))
    text = f"model: {{id: {model}}}\n{DATA % (folder / 'ids.jsonl')}max_shard_size: 30KB\n{extra}steps: {steps}\n"
    return recipe.parse(text, "test.yaml")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in TIMES}


STEPS = {
    "rtn": "[quant.rtn: {bits: 4, group_size: 32}]",
    "gptq": "[quant.gptq: {bits: 3, group_size: 32}]",
    "lim": "[quant.gptq: {bits: 3, group_size: 32, allocate: lim}]",
    "zd": "[quant.rtn: {bits: 3, group_size: 32, allocate: zd, overrides: {down_proj: {bits: 16}}}]",
    "local": "[prune.magnitude: {ratio: 0.3}]",
    "global": "[prune.magnitude: {ratio: 0.3, scope: global, refit: true}]",
    "blocks": "[prune.magnitude: {ratio: 0.4, units: [blocks]}, quant.gptq: {bits: 4, group_size: 32}]",
    "parts": "[prune.magnitude: {ratio: 0.3, units: [attention, mlp]}, attention.a_shape: {sinks: 2, window: 8}]",
    "all": "[prune.magnitude: {ratio: 0.2, scope: global, units: [ffn]}, quant.gptq: {bits: 4, group_size: 16}, "
           "attention.a_shape: {sinks: 2, window: 8, min_length: 0}, kv.snapkv: {ratio: 0.5, window: 8}]",
    "kv": "[kv.streaming: {budget: 16}]",
    "narrow": "[prune.magnitude: {ratio: 0.3, units: [ffn]}]",
}
CASES = [*(("llama", steps, {}) for steps in STEPS), ("qwen3", "all", {"tie_word_embeddings": True}),
         ("llama", "all", {"tie_word_embeddings": True}), ("gpt_neox", "rtn", {}), ("gemma3_text", "all", {}),
         ("gpt2", "gptq", {}), ("gpt2", "narrow", {}), ("opt", "narrow", {}), ("phi3", "gptq", {})]


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
