"""What `llmopt show` prints: the contents of a checkpoint, or what can be told of any other model."""
import re
from typing import Any

import click

from llmopt.cli.tables import COLUMNS, human, print_heads, print_json, print_table
from llmopt.model.architectures import UNITS
from llmopt.parts import default_of, fields_of, get, names, plain


def show_dense(facts: dict[str, Any], as_json: bool) -> None:
    """Shape, size and type of a model that llmopt did not write, then what of llmopt works on it."""
    if as_json:
        print_json(facts)
        return
    count, size = facts["parameters"], facts["bytes"]
    rows = [*(("source", told) for told in facts["made_from"]), ("architecture", facts["architecture"]),
            *facts["shape"].items(),
            ("parameters", f"{count:,}" if count else "unknown"), ("weights", human(size) if size else "unknown"),
            ("type", facts["dtype"] or "unknown"), ("bits", f"{_each(facts['bits'])}, {_rounding(facts)}")]
    if facts["level"]:
        rows.append(("level", facts["level"]))
    if facts["compressed"]:
        rows.append(("compressed", facts["compressed"]))
    rows += [("carried over", f"{name}, {count:,} parameters") for name, count in facts["carried"].items()]
    print_table(facts["model"], ["", "value"], rows)
    if facts["works"]:
        parts = ((f"pruning of {part}" if part in UNITS else part, answer) for part, answer in facts["works"].items())
        print_table("what llmopt can do with it", ["part", "works"], parts)
    if facts["note"]:
        click.echo(facts["note"])


def _rounding(facts: dict[str, Any]) -> str:
    if facts["quantized_by"]:
        return f"quantized by {facts['quantized_by']}"
    return "as it is read" if facts["made_from"] else "not quantized"


def _each(bits: list[int]) -> str:
    return " ".join(map(str, bits)) or "unknown"


def show_checkpoint(facts: dict[str, Any], as_json: bool) -> None:
    """A checkpoint's provenance, sizes, bits and per-layer shapes."""
    if as_json:
        print_json(facts)
        return
    rows = [("base model", facts["base_model"]), *(("source", told) for told in facts.get("base_told", [])),
            ("file size", human(facts["bytes"])),
            ("format", ", ".join(filter(None, (facts["format"], facts["packing"])))), ("layers", facts["layers"]),
            ("bits", _bits(facts["bits"]))]
    if told := facts.get("calibration"):
        rows.append(("calibration", ", ".join(f"{told[key]:,} {word}" for key, word in
                                              (("samples", "rows"), ("tokens", "tokens")) if key in told)))
    rows += [(f"loads with {way}", result) for way, result in facts["loads_with"].items()]
    rows += [(name, f"{before} -> {after}") for name, before, after in facts.get("table", [])]
    print_table("checkpoint", ["", "value"], rows)
    print_table("steps", ["step", "asked for", "what came of it"],
                [(r["method"], _brief(_changed(r)), _brief(r["meta"])) for r in facts.get("records", [])])
    for record in facts.get("records", []):
        show_bits(record["method"], record["meta"].get("modules", {}))
        show_shares(record["method"], record["meta"].get("shares", []))
    if layers := facts["per_layer_config"]:
        print_table("layers with shapes of their own", ["layer", "config"], [(i, _brief(c)) for i, c in layers.items()])


def _bits(counts: dict[str, int]) -> str:
    """"3 (28 weights), 4 (14 weights)"; no count where nothing is quantized."""
    return ", ".join(f"{bits} ({count} weights)" if count else f"{bits}, not quantized" for bits, count in
                     counts.items()) or "unknown"


def show_bits(step: str, modules: dict[str, dict]) -> None:
    """Bits of every weight, a row for each layer, where they differ; `modules` is a quantization step's record."""
    found = [(re.search(r"\.(\d+)\.(?:.*\.)?([a-z]\w*)(?:\.\d+)?$", name, re.I), entry["bits"])     # .3: of an expert
             for name, entry in modules.items()]
    layers: dict[str, dict[str, int]] = {}
    for place, bits in found:
        if place:
            layers.setdefault(place[1], {})[place[2].removesuffix("_proj")] = bits
    if len({bits for _, bits in found}) > 1:
        names = list(dict.fromkeys(name for row in layers.values() for name in row))
        print_table(f"bits of {step}", ["layer", *names],
                    ((layer, *(row.get(name, "") for name in names[:COLUMNS])) for layer, row in layers.items()))


def show_shares(step: str, shares: list[list[float]]) -> None:
    """Print how a kv step divides the cache over the KV heads of every layer."""
    if shares:
        print_heads(f"weights of the KV heads in the budget of {step}", shares)


def _changed(record: dict[str, Any]) -> dict[str, Any]:
    """The fields of a step that differ from their defaults; all, where another version of llmopt made it."""
    known = fields_of(get(record["method"])) if record["method"] in names() else {}
    defaults = {key: plain(default_of(item)) for key, item in known.items()}
    return {key: value for key, value in record["fields"].items()
            if key not in defaults or value != defaults[key]}


def _brief(meta: dict[str, Any]) -> str:
    lists = {k: " ".join(map(str, v)) for k, v in meta.items()
             if isinstance(v, list) and v and len(v) < 9 and isinstance(v[0], (int, str))}
    plain = {k: v for k, v in meta.items() if isinstance(v, (int, float, str, bool))} | lists
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in plain.items())
