"""Folders that a stranger may have made: a table of edits of one valid tiny folder.

`DENSE` are edits of a dense model, `MADE` of a checkpoint of llmopt with a cache method; tests/hostile_runs.py runs
commands on them.
"""
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
Edit = Callable[[Path], None]


# -------------------------------------------------------------------------------------------------- kinds of edits

def edited(file: str, **changes: Any) -> Edit:
    """Top-level keys of a JSON file set, or with `...` removed."""
    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        content |= changes
        (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

    return edit


def config(**changes: Any) -> Edit:
    return edited("config.json", **changes)


def text(file: str, content: str) -> Edit:
    return lambda folder: (folder / file).write_text(content) and None


def template(source: str) -> Edit:
    return text("chat_template.jinja", source)


def within(file: str, *path: Any) -> Edit:
    """The value at a path of a JSON file replaced by the last of `path`, called on the old one if it can be."""
    *keys, last, value = path

    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        place = content
        for key in keys:
            place = place[key]
        place[last] = value(place[last]) if callable(value) else value
        (folder / file).write_text(json.dumps(content))

    return edit


def llmopt_key(*path: Any) -> Edit:
    return within("config.json", "llmopt", *path)


def shares(value: Any) -> Edit:
    return llmopt_key("steps", 0, "meta", "shares", value)


def facts(*path: Any) -> Edit:
    return within("llmopt.json", *path)


def tensors(declared: dict[str, Any]) -> Edit:
    return llmopt_key("tensors", declared) if declared is None else within("config.json", "llmopt",
                                                                            lambda old: old | {"tensors": declared})


def header(count: int, spread: bool = False) -> Edit:
    """A weight file with `count` further tensors, of one value each, in its header."""
    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        own, end = json.loads(content[8:8 + size]), len(content) - 8 - size
        more = ",".join(f'"x{i}":{{"dtype":"F32","shape":[1],"data_offsets":[{end + 4 * i},{end + 4 * i + 4}]}}'
                        for i in range(count))
        text = (json.dumps(own)[:-1] + "," + more + "}").encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size:] + bytes(4 * count))

    return edit


def index(entries: int) -> Edit:
    def edit(folder: Path) -> None:
        names = {f"x{i}": f"model-{i:07d}.safetensors" for i in range(entries)}
        (folder / "model.safetensors").rename(folder / "model-0000000.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    return edit


def more_tensors(**values: torch.Tensor) -> Edit:
    def edit(folder: Path) -> None:
        save_file(load_file(folder / "model.safetensors") | values, folder / "model.safetensors", {"format": "pt"})

    return edit


def normalizer(*steps: dict[str, Any]) -> Edit:
    return edited("tokenizer.json", normalizer={"type": "Sequence", "normalizers": list(steps)})


def grows(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def splits(regex: str) -> Edit:
    return edited("tokenizer.json", pre_tokenizer={"type": "Split", "pattern": {"Regex": regex},
                                                   "behavior": "Isolated", "invert": False})


def templates(*names: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        listed = [{"name": name, "template": TEMPLATE} for name in ("default", *names)]
        edited("tokenizer_config.json", chat_template=listed)(folder)

    return edit


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"
DOUBLE = "{% set n = namespace(s='x') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
DENSE: dict[str, Edit] = {
    "template_loops": template(LOOP),
    "template_range": template("{% for a in range(10**9) %}x{% endfor %}"),
    "template_doubles": template(DOUBLE),
    "template_width": template("{{ '%1000000000000d' % 1 }}"),
    "template_format": template("{{ '{:>100000000000}'.format(1) }}"),
    "template_center": template("{{ 'x'.center(100000000000) }}"),
    "template_times": template("{{ 'x' * 100000000000 }}"),
    "template_power": template("{{ 9 ** 9 ** 9 }}"),
    "template_list": template("{{ [0] * 100000000000 }}"),
    "template_long": template("{{ 'x' * 90000000 }}"),
    "template_recursion": template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    "template_class": template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template_include": template("{% include '/etc/passwd' %}"),
    "template_syntax": template("{% for %}"),
    "template_deep": template("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"),
    "template_raises": template("{{ raise_exception('a\nb') }}"),
    "template_huge": template("{# " + "x" * 30_000_000 + " #}"),
    "template_name_above": templates("../../x"),
    "template_name_absolute": templates("/tmp/x"),
    "template_name_empty": templates(""),
    "template_is_a_number": edited("tokenizer_config.json", chat_template=3),
    "normalizer_grows": normalizer(*[grows(" ", " " * 10)] * 12),
    "normalizer_grows_once": normalizer(grows("e", "e" * 10_000_000)),
    "normalizer_doubles": normalizer(*[grows("t", "tt")] * 60),
    "normalizer_regex": normalizer({"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""}),
    "prepend": normalizer(*[{"type": "Prepend", "prepend": "x" * 10_000_000}] * 50),
    "split_catastrophic": splits("(?:(?:a|[a-z ])*)*!"),
    "split_backtracks": splits("^(([a-z .])+.)+[A-Z]([a-z])+$"),
    "split_empty": splits(""),
    "split_broken": splits("(["),
    "vocabulary_of_lists": edited("tokenizer.json", model=[1] * 100),
    "added_tokens_many": edited("tokenizer.json", added_tokens=[
        {"id": i, "content": f"<{i}>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True} for i in range(300_000)]),
    "added_token_of_negative_id": edited("tokenizer.json", added_tokens=[{"id": -1, "content": "x"}]),
    "tokenizer_deep": text("tokenizer.json", nested(100_000)),
    "header_of_a_million": header(10**6),
    "header_deep": lambda folder: (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", 200_000) + nested(100_000).encode()),
    "header_of_lists": lambda folder: (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", 90_000_000) + b'{"a":[' + b"[]," * 29_999_997 + b"1]}"),
    "index_of_a_million": index(10**6),
    "layers_a_billion": config(num_hidden_layers=10**9),
    "layers_many": config(num_hidden_layers=9_999, llmopt=...),
    "layers_many_with_tensors": lambda folder: (config(num_hidden_layers=9_000)(folder), header(20_000)(folder)),
    "layer_types_a_million": config(layer_types=["full_attention"] * 10**6),
    "layer_types_of_text": config(layer_types="full_attention"),
    "heads_a_billion": config(num_attention_heads=10**9, num_key_value_heads=10**9),
    "hidden_a_billion": config(hidden_size=10**9),
    "vocabulary_a_billion": config(vocab_size=10**12),
    "positions_a_billion": config(max_position_embeddings=10**12),
    "rope_of_lists": config(rope_parameters={"rope_type": "longrope", "short_factor": [1] * 10**6,
                                             "long_factor": [1] * 10**6, "rope_theta": 1e4}),
    "rope_of_zero": config(rope_parameters={"rope_type": "default", "rope_theta": 0}),
    "rope_unknown": config(rope_parameters={"rope_type": "evil"}),
    "per_layer_deep": config(per_layer_config={"0": json.loads(nested(500))}),
    "per_layer_many": config(per_layer_config={str(i): {"intermediate_size": 64} for i in range(300_000)}),
    "per_layer_negative": config(per_layer_config={"0": {"intermediate_size": -64}}),
    "per_layer_skip_unknown": config(per_layer_config={"0": {"skip": ["everything"]}}),
    "config_deep": text("config.json", '{"model_type": "llama", "x": ' + nested(100_000) + "}"),
    "config_long": text("config.json", '{"model_type": "llama", "x": [' + "1," * 20_000_000 + "1]}"),
    "config_digits": text("config.json", '{"model_type": "llama", "vocab_size": ' + "9" * 100_000 + "}"),
    "labels_many": config(id2label={str(i): "x" for i in range(300_000)}),
    "dtype_unknown": config(dtype="float3"),
    "dtype_of_code": config(dtype="nn"),
    "experts_a_billion": config(model_type="mixtral", num_local_experts=10**9),
    "generation_broken": edited("generation_config.json", temperature=-1, num_beams="x", cache_implementation="evil"),
    "generation_deep": text("generation_config.json", '{"x": ' + nested(50_000) + "}"),
    "run_time_key_unasked": config(llmopt={"steps": [{"method": {"kv.snapkv": {}}, "meta": {}}]}),
    "link_out": lambda folder: ((folder / "model.safetensors").unlink(),
                                (folder / "model.safetensors").symlink_to("/etc/passwd")),
    "fifo_for_weights": lambda folder: ((folder / "model.safetensors").unlink(),
                                        os.mkfifo(folder / "model.safetensors")),
    "fifo_for_config": lambda folder: ((folder / "config.json").unlink(), os.mkfifo(folder / "config.json")),
    "fifo_for_tokenizer": lambda folder: ((folder / "tokenizer.json").unlink(), os.mkfifo(folder / "tokenizer.json")),
    "endless_config": lambda folder: ((folder / "config.json").unlink(),
                                      (folder / "config.json").symlink_to("/dev/zero")),
}
MADE: dict[str, Edit] = {
    "shares_missing": llmopt_key("steps", 0, "meta", {}),
    "shares_of_fewer_layers": shares(lambda old: old[:1]),
    "shares_of_more_layers": shares(lambda old: old * 3),
    "shares_of_other_heads": shares(lambda old: [[1.0] * 7 for _ in old]),
    "shares_of_text": shares(lambda old: [["x"] * len(row) for row in old]),
    "shares_nan": shares(lambda old: [[float("nan")] * len(row) for row in old]),
    "shares_infinite": shares(lambda old: [[float("inf")] * len(row) for row in old]),
    "shares_negative": shares(lambda old: [[-1.0] * len(row) for row in old]),
    "shares_bool": shares(lambda old: [[True] * len(row) for row in old]),
    "shares_a_number": shares(3),
    "shares_deep": shares(json.loads(nested(400))),
    "shares_a_million": shares([[1.0] * 1000] * 1000),
    "steps_a_number": llmopt_key("steps", 5),
    "steps_of_text": llmopt_key("steps", ["kv.snapkv"]),
    "steps_many": llmopt_key("steps", lambda old: old * 1000),
    "step_without_method": llmopt_key("steps", [{"meta": {}}]),
    "step_without_meta": llmopt_key("steps", [{"method": {"kv.snapkv": {}}}]),
    "step_of_two_methods": llmopt_key("steps", 0, "method", {"kv.snapkv": {}, "kv.streaming": {}}),
    "step_unknown": llmopt_key("steps", 0, "method", {"kv.evil": {}}),
    "step_of_weights": llmopt_key("steps", 0, "method", {"quant.rtn": {}}),
    "step_of_scores": llmopt_key("steps", 0, "method", {"heads.span": {}}),
    "field_unknown": llmopt_key("steps", 0, "method", "kv.snapkv", "evil", 1),
    "field_of_text": llmopt_key("steps", 0, "method", "kv.snapkv", "window", "x"),
    "field_huge": llmopt_key("steps", 0, "method", "kv.snapkv", "window", 10**18),
    "field_nan": llmopt_key("steps", 0, "method", "kv.snapkv", "ratio", float("nan")),
    "fields_a_list": llmopt_key("steps", 0, "method", {"kv.snapkv": [1]}),
    "key_a_number": within("config.json", "llmopt", 7),
    "key_a_list": within("config.json", "llmopt", [1]),
    "tensors_many": tensors({f"0.x{i}": {"shape": [1], "dtype": "float32"} for i in range(100_000)}),
    "tensors_huge": tensors({"0.x": {"shape": [20_000_000_000], "dtype": "float32"}}),
    "tensors_of_text": tensors({"0.x": "float32"}),
    "tensors_negative": tensors({"0.x": {"shape": [-1], "dtype": "float32"}}),
    "tensors_of_code": tensors({"0.x": {"shape": [1], "dtype": "load"}}),
    "tensors_deep": tensors({".".join("a" * 5000): {"shape": [1], "dtype": "float32"}}),
    "tensors_named_like_methods": tensors({"0.forward": {"shape": [1], "dtype": "float32"}}),
    "tensors_without_name": tensors({"": {"shape": [1], "dtype": "float32"}}),
    "tensors_a_list": tensors([1]),
    "facts_shares_nan": facts("records", 3, "meta", "shares", [[float("nan")]]),
    "facts_shares_deep": facts("records", 3, "meta", "shares", json.loads(nested(400))),
    "facts_shares_wide": facts("records", 3, "meta", "shares", [[1.0] * 1_000_000]),
    "facts_shares_many": facts("records", 3, "meta", "shares", [[1.0, 1.0]] * 500_000),
    "facts_shares_missing": facts("records", 3, "meta", {}),
    "facts_shares_of_fewer_layers": facts("records", 3, "meta", "shares", lambda old: old[:-1]),
    "facts_shares_of_text": facts("records", 3, "meta", "shares", "many"),
    "facts_scores_of_text": facts("records", 0, "meta", "scores", lambda old: [["x"] for _ in old]),
    "facts_bits_missing": facts("records", 2, "meta", {}),
    "facts_fields_wrong": facts("records", 2, "fields", "bits", 99),
    "facts_fields_unknown": facts("records", 1, "fields", lambda old: old | {"ratios": 0.5}),
    "facts_fields_deep": facts("records", 2, "fields", "overrides", {".".join("a" * 5000): {"bits": "x"}}),
    "facts_records_many": facts("records", lambda old: old * 1_000),
    "facts_modules_many": facts("records", 2, "meta", "modules", {
        f"model.layers.{i}.x{i}": {"bits": i % 3} for i in range(100_000)}),
    "facts_table_many": facts("table", lambda _: [["a", "b", "c"]] * 300_000),
    "facts_table_wide": facts("records", 0, "meta", {f"k{i}": i for i in range(100_000)}),
    "facts_text_long": facts("base_model", "x" * 20_000_000),
    "facts_of_lists": text("llmopt.json", '{"x": [' + "[]," * 20_000_000 + "1]}"),
    "facts_deep": text("llmopt.json", '{"x": ' + nested(100_000) + "}"),
    "facts_of_codes": facts("base_model", "\x1b[31m\x00\n[red]"),
    "packed_shape_huge": more_tensors(**{"model.layers.0.mlp.up_proj.weight_shape": torch.tensor([10**9, 10**9])}),
    "packed_shape_negative": more_tensors(**{"model.layers.0.mlp.up_proj.weight_shape": torch.tensor([-64, 32])}),
    "quantization_of_text": within("config.json", "quantization_config", "x"),
    "quantization_groups_many": within("config.json", "quantization_config", "config_groups", lambda old: {
        f"group_{i}": next(iter(old.values())) for i in range(50_000)}),
    "quantization_bits_huge": within("config.json", "quantization_config", "config_groups", lambda old: {
        key: group | {"weights": group["weights"] | {"num_bits": 10**9}} for key, group in old.items()}),
    "skips_everything": within("config.json", "per_layer_config", lambda old: {
        key: {**layer, "skip": ["attention", "mlp"]} for key, layer in old.items()}),
}
