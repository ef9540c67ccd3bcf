"""The README.md of a checkpoint: a model card made from llmopt.json alone, so it can be written again at any time."""
import math
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment

from llmopt.checkpoint.compressed_tensors import TABLE, ours, rounded_inputs
from llmopt.checkpoint.facts import FILE, read_facts, read_layers
from llmopt.errors import one_line
from llmopt.files.json_shapes import finite
from llmopt.files.packaged import EMBEDDED
from llmopt.files.shards import write_text
from llmopt.model.architectures import SPECS, Spec
from llmopt.model.auto import CAUSAL, SEEING, auto_name
from llmopt.model.expert_files import EXPERTS
from llmopt.parts import get, names

TEMPLATE = """---
{{ metadata }}
---
# {{ title }}

{{ origin }}, compressed with llmopt {{ versions["llmopt"] }}
{%- if sizes %}: {{ sizes[0] }} of weights became {{ sizes[1] }}{% endif %}.
{%- for told in told %}

What was compressed came from {{ told }}.
{%- endfor %}
{% if note %}
Of the model, {{ note }}.
{% endif %}
{%- if steps %}
```yaml
steps:
{%- for step in steps %}
  - {{ step }}
{%- endfor %}
```
{% for method, note in notes %}
- `{{ method }}`: {{ note }}.
{%- endfor %}
{% endif %}
## Loading

{{ loading }}

```python
{{ "import llmopt\n" if needs_import }}from transformers import {{ auto }}{{ ", AutoTokenizer" if tokenizer }}

model = {{ auto }}.from_pretrained("{{ repo or "." }}"){{ "      # this folder" if not repo }}
{%- if tokenizer %}
tokenizer = AutoTokenizer.from_pretrained("{{ repo or "." }}")
ids = tokenizer("Once upon a time", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))
{%- endif %}
```

| way | result |
|---|---|
{%- for way, result in loads_with.items() %}
| {{ way }} | {{ result }} |
{%- endfor %}

Written, loaded again and compared with transformers {{ versions["transformers"] }}.
{%- if rotary_of_5 %} It takes transformers>=5: the names of older versions cannot say its rotary settings.
{%- else %} Its settings also stand under the names of transformers 4 (4.56 or newer), with which it was not checked.
{%- endif %}

## Made by
{% if command %}
```bash
{{ command }}
```
{%- if "FOLDER" in command %}

base_model: {{ name }}, not a name of the hub; FOLDER stands for it
{%- endif %}
{% else %}
`llmopt.compress` and `llmopt.save` in Python, with the steps above.
{% endif %}
{%- if calibration %}
{{ calibration }}
{% endif %}
Versions: {% for k, v in versions.items() %}{{ k }} {{ v }}{{ ", " if not loop.last }}{% endfor %}.
{% if table %}
## Measured

Before is the model that was compressed, after is this one.{{ scored }}

| | before | after |
|---|---|---|
{%- for row in table %}
| {{ row[0] }} | {{ row[1] }} | {{ row[2] }} |
{%- endfor %}
{% endif %}"""


def write_card(folder: Path, facts: dict[str, Any] | None = None) -> None:
    """Write README.md from the folder's llmopt.json, or the facts that it will have; runs repeat: without its name."""
    write_text(folder / "README.md", render(folder, facts=facts))


def card_for(folder: Path, repo: str) -> str | None:
    """The card under the name `repo`; None for a folder whose README.md is not ours, or was edited."""
    mine = folder / "README.md"
    if not mine.is_file() or not (folder / FILE).is_file():
        return None
    text = mine.read_text(encoding="utf-8", errors="replace")
    return render(folder, repo) if text == render(folder) else None


def render(folder: Path, repo: str | None = None, facts: dict[str, Any] | None = None) -> str:
    """The text of the card of the checkpoint in `folder`, or under the hub name `repo`; facts: not those in it."""
    facts, config = facts or read_facts(folder), read_layers(folder)
    name, auto = _name(facts, config), auto_name(str(config.get("model_type")), config.get("architectures"))
    title = repo or f"{name.split('/')[-1]}, compressed"
    text = Environment(autoescape=False).from_string(TEMPLATE).render(
        title=title, repo=repo, name=name, auto=auto, metadata=_metadata(facts, config, title, auto),
        origin=_origin(facts, name),
        told=[one_line(told) for told in facts.get("base_told", [])],
        note="" if any(record["meta"].get("experts") for record in facts.get("records", [])) else
        SPECS.get(str(config.get("model_type")), Spec()).note, table=facts.get("table", []),
        sizes=next((row[1:] for row in facts.get("table", []) if row[0] == "file size"), None),
        steps=[_step(record) for record in facts.get("records", [])],
        notes=[(one_line(record["method"]), one_line(note)) for record in facts.get("records", [])
               for note in record["meta"].get("notes", [])],
        loading=" ".join(_loading(facts, config)), tokenizer=(folder / "tokenizer_config.json").is_file(),
        needs_import=facts["loads_with"]["transformers"] != "exact", command=_command(facts),
        calibration=_calibration(facts), scored=_scored(facts),
        rotary_of_5="rope_parameters" in config and not {"rope_theta", "rotary_emb_base"} & config.keys(),
        **{key: facts[key] for key in ("versions", "loads_with")})
    return text.rstrip("\n") + "\n"


def _step(record: dict[str, Any]) -> str:
    """A step with its settings in one line of YAML, as a recipe has it."""
    given = {key: value for key, value in record["fields"].items() if value not in (None, [], {})}
    text = yaml.safe_dump({record["method"]: given}, default_flow_style=True, sort_keys=False, width=math.inf)
    return " ".join(text.strip()[1:-1].splitlines())


def _name(facts: dict[str, Any], config: dict[str, Any]) -> str:
    """How the card calls the model that was compressed: by its name on the hub, or by its folder without the path."""
    given = facts["base_model"]
    if facts.get("base_repo") or given in EMBEDDED:
        return facts.get("base_repo") or given
    path = one_line(Path(given).name)
    older = "base_repo" not in facts and not given.startswith(("/", ".", "~"))       # older files do not tell
    return (given if older else path) or f"a {config.get('model_type')} model"


def _origin(facts: dict[str, Any], name: str) -> str:
    if facts.get("base_repo"):
        return f"[{name}](https://huggingface.co/{name})"
    if ancestor := facts.get("base_ancestor"):
        return f"{name}, a local folder made from [{ancestor}](https://huggingface.co/{ancestor})"
    return f"{name}, the small model that llmopt comes with" if name in EMBEDDED else f"{name}, a local model"


def _metadata(facts: dict[str, Any], config: dict[str, Any], title: str, auto: str) -> str:
    """The YAML at the head of the card, in the terms of the hub."""
    from huggingface_hub import EvalResult, ModelCardData

    methods = [record["method"] for record in facts.get("records", [])]
    packed = "quantization_config" in config
    base = facts.get("base_repo") or facts.get("base_ancestor")
    results = [EvalResult(task_type="text-generation", dataset_type=task, dataset_name=task, metric_type=metric,
                          metric_value=value)
               for task, metric, value in facts.get("scores", {}).get("after", []) if finite(value)]
    quantized = base and any(method.startswith("quant.") for method in methods)
    return ModelCardData(
        base_model=base, license=facts["base_licence"], library_name="transformers",
        pipeline_tag="text-generation" if auto == CAUSAL else "image-text-to-text" if auto == SEEING else "any-to-any",
        tags=["llmopt", "compressed", *(["compressed-tensors"] if packed else []), *dict.fromkeys(methods)],
        **({"model_name": title, "eval_results": results} if results else {}), **facts.get("base_licence_more", {}),
        **({"base_model_relation": "quantized"} if quantized else {})).to_yaml()


def _loading(facts: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Sentences on what each way of loading needs, and on what it leaves out."""
    told = []
    if "per_layer_config" in config:
        told += ["**Its layers have shapes of their own**: plain transformers refuses it. `import llmopt` first, or "
                 "load it with `trust_remote_code=True`."]
    if "llmopt" in config:
        told += [f"{_live(facts)} while the model runs, and only after `import llmopt`, or with "
                 "`trust_remote_code=True` where llmopt is installed. Without that the same weights run with a whole "
                 "KV cache and dense attention."]
    if TABLE in ours(config):
        told += ["**Its embedding is packed, at less than 8 bits**: plain transformers refuses it ('Embedding' object "
                 "has no attribute 'weight'). `import llmopt` first."]
    if EXPERTS in ours(config):
        told += ["**Its experts are packed one by one**, where the dense files keep them in one tensor: plain "
                 "transformers refuses it. `import llmopt` first."]
    if not told:
        told += ["Plain transformers loads it, exactly as it was measured."]
    if "quantization_config" in config:
        packed = config["quantization_config"] if isinstance(config["quantization_config"], dict) else {}
        at_once = packed.get("dequantize") or TABLE in ours(config)
        moment = "while it loads them" if at_once else "at the first forward"
        told += ["Loading needs the package `compressed-tensors`. The file is small; transformers unpacks the weights "
                 f"{moment}, so in memory they take as much as before."]
        told += [f"What the weights read is rounded, too ({how}), by transformers as by kernels for such numbers; the "
                 "scores are of that." for how in rounded_inputs(packed)]
    return told


def _live(facts: dict[str, Any]) -> str:
    """The steps that act while the model runs, and their verb."""
    methods = dict.fromkeys(record["method"] for record in facts.get("records", []))
    live = [f"`{name}`" for name in methods if name in names() and get(name).stage == "runtime"]
    return f"{' and '.join(live) or 'Some of its parts'} {'acts' if len(live) == 1 else 'act'}"


def _command(facts: dict[str, Any]) -> str | None:
    """The command that makes this checkpoint from recipe.yaml; None for one that was made in Python."""
    if facts.get("recipe") is None:
        return None
    words = ["llmopt compress --recipe recipe.yaml"]
    if not facts.get("base_repo") and facts["base_model"] not in EMBEDDED:
        words += ["--model FOLDER"]
    return " ".join([*words, *(w for w in facts.get("changes", []) if w == "--trust-remote-code"), "--output out"])


def _calibration(facts: dict[str, Any]) -> str:
    told, name = facts.get("calibration", {}), _asked(facts, "data", "name")
    if not {"samples", "tokens"} <= told.keys():
        return ""
    source = f" of the data `{one_line(str(name))}`" if name else ""
    return f"Calibrated with {told['samples']:,} rows, {told['tokens']:,} tokens{source}."


def _scored(facts: dict[str, Any]) -> str:
    """Sentences on what the scores are of."""
    tasks = {task for task, _, _ in facts.get("scores", {}).get("after", [])}
    told, limit, data = [], _asked(facts, "eval", "limit"), _asked(facts, "data", "name")
    if "fidelity" in tasks:
        source = "rows that the model itself wrote" if data == "self" else f"rows of the data `{one_line(str(data))}`"
        told += [f"KL, agreement and perplexity are on {source}, which the calibration did not see."]
    if tasks - {"fidelity"}:
        part = f"the first {one_line(str(limit))} documents" if limit else "all documents"
        told += [f"Scores of tasks are on {part} of each."]
    return "".join(f" {sentence}" for sentence in told) + (
        " Details: `eval-before.json` and `eval-after.json`." if told else "")


def _asked(facts: dict[str, Any], section: str, key: str) -> Any:
    """What the recipe of the run says under a key; None where there was none."""
    found = (facts.get("recipe") or {}).get(section)
    return found.get(key) if isinstance(found, dict) else None
